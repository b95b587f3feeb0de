"""Sites that tests train: small random models of every family, split with float slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tests.checkpoints import SMALL, random_model, save
from trifold.cloud.split.split import split
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import CodecName, Cuts, Tier
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.training.cache import RowCache
from trifold.shared.training.lora import LoraSettings, add_lora, factors, load_factors
from trifold.shared.training.shard import TorchShard
from trifold.shared.training.site import Core, LocalCore, SiteModel
from trifold.shared.training.slices import FloatSlice

CUTS: Final = Cuts(edge=2, cloud=3)
"""Of four layers: two on the edge, one of them with experts, one in the core, one on the device."""

LORA: Final = LoraSettings(rank=4)


def train_bundle(family: str, out: Path, *, cuts: Cuts = CUTS, **changes: Any) -> tuple[Any, Path]:
    """transformers' model with random weights, and the bundle of the same with its float slices."""
    model = random_model(family, **changes)
    checkpoint = save(model, out / "checkpoint")
    split(Checkpoint.open(checkpoint), cuts, out / "bundle", train=True)
    return model, out / "bundle"


def floats(bundle: Path, tier: Tier) -> FloatSlice:
    return FloatSlice.open(TierFolder.open(bundle, tier))


def shard(bundle: Path, tier: Tier, **options: Any) -> TorchShard:
    return TorchShard.load(floats(bundle, tier), **options)


def local_core(bundle: Path, rows: CodecName = "none", gradients: CodecName = "none") -> LocalCore:
    core = shard(bundle, "cloud")
    hidden = floats(bundle, "cloud").spec.hidden
    return LocalCore(core, RowCodec(rows, hidden), RowCodec(gradients, hidden))


def site(
    bundle: Path,
    lora: LoraSettings = LORA,
    *,
    core: Core | None = None,
    cache: RowCache | None = None,
) -> SiteModel:
    """A site with LoRA; its core is in this process and without a codec unless another is given."""
    edge, device = shard(bundle, "edge"), shard(bundle, "device")
    for each in (edge, device):
        add_lora(each, lora)
    return SiteModel(edge, device, core or local_core(bundle), cache)


def unsettle(site: SiteModel, seed: int = 0) -> None:
    """Give the factors B values other than 0, so that all of them have gradients."""
    rng = np.random.default_rng(seed)
    drawn = {name: rng.normal(0, 0.1, array.shape) for name, array in factors(site.shards).items()}
    load_factors(site.shards, {name: array.astype(np.float32) for name, array in drawn.items()})


def tokens(sequences: int, length: int, seed: int = 0) -> NDArray[np.int64]:
    """Random token ids (sequences, length + 1)."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, SMALL["llama"]["vocab_size"], (sequences, length + 1))
