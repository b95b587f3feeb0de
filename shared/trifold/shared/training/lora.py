"""LoRA on a shard (arXiv 2106.09685), by peft: attention and dense projections, never inside experts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from trifold.shared.bundle.manifest import Tier
from trifold.shared.errors import InvalidRequest
from trifold.shared.training.shard import TorchShard

Factors = dict[str, NDArray[np.float32]]
"""By the checkpoint's name of a projection and `.lora_A` (rank, inputs) or `.lora_B` (outputs, rank)."""

_SUFFIX: Final = ".default.weight"
_ENDS: Final = (f".lora_A{_SUFFIX}", f".lora_B{_SUFFIX}")
"""How peft's names for the factors of its first adapter end."""


@dataclass(frozen=True)
class LoraSettings:
    """A projection W becomes W + alpha/rank * B @ A.

    With `freeze_a` only B is trained, which makes the mean of updates exact (FFA-LoRA, arXiv 2403.12313).
    """

    rank: int = 8
    alpha: float = 16.0
    seed: int = 0
    tiers: tuple[Tier, ...] = ("edge", "device")
    freeze_a: bool = False


def add_lora(shard: TorchShard, settings: LoraSettings) -> None:
    """Put factors beside the projections of the shard, if its tier is one of the settings'.

    A is drawn from the seed and the projection's name alone, B is 0: every site begins with the same factors,
    and with the model as it was. A shard without layers has no projections, and stays as it is.
    """
    targets = _projections(shard)
    if shard.tier not in settings.tiers or not targets:
        return
    # peft says int, and computes with any number.
    alpha = cast(int, settings.alpha)
    config = LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=targets)
    inject_adapter_in_model(config, shard)
    for name, parameter in _parameters([shard]):
        if name.endswith(".lora_A"):
            parameter.data = _first_a(parameter.shape, settings.seed, name).to(parameter.device)
            parameter.requires_grad_(not settings.freeze_a)
        else:
            parameter.data = torch.zeros(parameter.shape, device=parameter.device)


def factors(shards: Iterable[TorchShard], *, trained_only: bool = False) -> Factors:
    """A copy of all factors, sorted by name; with `trained_only` without the A that `freeze_a` freezes."""
    return {
        name: parameter.detach().cpu().numpy().copy()
        for name, parameter in sorted(_parameters(shards), key=lambda item: item[0])
        if parameter.requires_grad or not trained_only
    }


def load_factors(shards: Iterable[TorchShard], given: Mapping[str, NDArray[np.float32]]) -> None:
    """Set the factors that are named; others stay as they are.

    Raises InvalidRequest naming a factor that the shards do not have or that has another shape; nothing is
    changed then.
    """
    parameters = dict(_parameters(shards))
    for name, values in given.items():
        if name not in parameters:
            raise InvalidRequest(f"{name}: no such factor here; was LoRA added with the same settings?")
        if values.shape != parameters[name].shape:
            wanted = tuple(parameters[name].shape)
            raise InvalidRequest(f"{name}: a factor of {values.shape} where {wanted} is needed")
    with torch.no_grad():
        for name, values in given.items():
            parameters[name].copy_(torch.from_numpy(values.astype(np.float32)))


def _projections(shard: TorchShard) -> list[str]:
    """All linear modules of the layers: routers and experts are none in transformers 5."""
    return [
        name
        for name, module in shard.named_modules()
        if name.startswith("model.layers.") and isinstance(module, nn.Linear)
    ]


def _parameters(shards: Iterable[TorchShard]) -> Iterator[tuple[str, nn.Parameter]]:
    for shard in shards:
        for name, parameter in shard.named_parameters():
            if name.endswith(_ENDS):
                yield shard.checkpoint_name(name).removesuffix(_SUFFIX), parameter


def _first_a(shape: torch.Size, seed: int, name: str) -> torch.Tensor:
    """Uniform within ±1/sqrt(inputs), as in LoRA's own code (Kaiming's with a = sqrt 5)."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    values = np.random.default_rng([seed, place]).uniform(-1.0, 1.0, tuple(shape)) / sqrt(shape[1])
    return torch.from_numpy(values.astype(np.float32))
