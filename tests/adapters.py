"""LoRA factors for tests: random ones that change what a model says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from trifold.shared.bundle.factors import Float, LoraFactors
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import Tier
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.model.shapes import tensor_shapes

RANK = 4
ALPHA = 8.0


def random_factors(
    checkpoint: Path, bundle: Path, *, seed: int = 0, tiers: Iterable[Tier] = ("edge", "device")
) -> LoraFactors:
    """Of every attention and dense projection of these tiers, as large as the weights themselves."""
    names = Checkpoint.open(checkpoint).names
    serving = TierFolder.open(bundle, "edge").manifest.serving
    layers = {layer for tier in tiers for layer in serving.cuts.layers(tier, len(serving.spec.layers))}
    prefixes = tuple(names.layer(layer).input_norm.removesuffix("input_layernorm.weight") for layer in layers)
    rng = np.random.default_rng(seed)
    tensors: dict[str, Float] = {}
    for name, shape in tensor_shapes(names).items():
        if name.startswith(prefixes) and name.endswith("_proj.weight") and ".experts." not in name:
            outputs, inputs = shape
            projection = name.removesuffix(".weight")
            tensors[f"{projection}.lora_A"] = _normal(rng, (RANK, inputs))
            tensors[f"{projection}.lora_B"] = _normal(rng, (outputs, RANK)) / np.float32(2)
    return LoraFactors(tensors, ALPHA, RANK)


def _normal(rng: np.random.Generator, shape: tuple[int, int]) -> Float:
    return rng.standard_normal(shape, np.float32) / np.float32(shape[1] ** 0.5)
