"""Federated against local-only and centralized training, by the held-out loss of three sites and three seeds.

Every column takes equal optimizer steps with equal batches and the same schedule. The federation is the real
one: SuperLink, SuperNodes, training process, resident trainers, each a process. The other two are trained in
this process by the same code, with the same codecs at the cuts.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch
from tokenizers import Tokenizer

from tests.bench.nano import CHECKPOINT
from trifold.cloud.federation.settings import RunSettings
from trifold.cloud.split.split import split
from trifold.device.demo.federated.command import SETTINGS
from trifold.device.demo.federated.federation import Federation
from trifold.device.demo.federated.texts import write_texts
from trifold.edge.federation.text import SiteText
from trifold.shared.bundle.factors import LoraFactors
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import TIERS, Cuts
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.training.lora import LoraSettings, add_lora, load_factors
from trifold.shared.training.shard import TorchShard
from trifold.shared.training.site import LocalCore, SiteModel
from trifold.shared.training.slices import FloatSlice
from trifold.shared.training.training import TrainSettings, evaluate, train

SEEDS: Final = (0, 1, 2)
ROUNDS: Final = 8
STEPS: Final = 12
LOCAL: Final = RunSettings.read(None, SETTINGS).local
"""What the sites of the federation are told: the others train by the same."""

_BATCHES: Final = 16
"""Of held-out text."""


class House:
    """A bundle with float slices, and models made from it."""

    def __init__(self, bundle: Path) -> None:
        self.folders = {tier: TierFolder.open(bundle, tier) for tier in TIERS}
        self._slices = {tier: FloatSlice.open(folder) for tier, folder in self.folders.items()}
        codec = RowCodec("int8", self._slices["edge"].spec.hidden)
        self._core = LocalCore(TorchShard.load(self._slices["cloud"]), codec, codec)

    def model(self, seed: int) -> SiteModel:
        edge, device = (TorchShard.load(self._slices[tier]) for tier in ("edge", "device"))
        for shard in (edge, device):
            add_lora(shard, LoraSettings(seed=seed))
        return SiteModel(edge, device, self._core)


def main() -> None:
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder:
        root = Path(folder)
        bundle = root / "bundle"
        split(Checkpoint.open(CHECKPOINT), Cuts(edge=2, cloud=5), bundle, train=True)
        house = House(bundle)
        tokenizer = Tokenizer.from_buffer(house.folders["device"].read("tokenizer.json"))
        folders = write_texts(root / "texts")
        texts = {site: SiteText.read(path, tokenizer) for site, path in folders.items()}
        print("| seed | site | before | local only | federated | centralized |")
        print("|---|---|---|---|---|---|")
        kept = []
        for seed in SEEDS:
            before = _losses(house.model(seed), texts)
            local = {site: _trained(house, seed, text, texts)[site] for site, text in texts.items()}
            federated = _federated(house, root / f"federation-{seed}", bundle, folders, seed, texts)
            centralized = _trained(house, seed, _pooled(texts), texts)
            for site in texts:
                losses = (column[site] for column in (before, local, federated, centralized))
                print(f"| {seed} | {site} | {' | '.join(f'{loss:.3f}' for loss in losses)} |", flush=True)
            gains = [_gain(before, after) for after in (local, federated, centralized)]
            print(f"| {seed} | gain | | {' | '.join(f'{gain:.3f}' for gain in gains)} |", flush=True)
            kept.append(gains[1] / gains[2])
        print(f"\nFederated reaches {statistics.mean(kept):.1%} of the centralized gain", end="")
        print(f" ({', '.join(f'{share:.1%}' for share in kept)}).")


def _trained(house: House, seed: int, text: SiteText, texts: Mapping[str, SiteText]) -> dict[str, float]:
    """The held-out losses after training on one text."""
    model = house.model(seed)
    batches = text.batches(LOCAL.sequences, LOCAL.length, seed=seed, start=0)
    train(model, batches, TrainSettings(ROUNDS * STEPS, LOCAL.learning_rate, warmup=LOCAL.warmup))
    return _losses(model, texts)


def _federated(
    house: House,
    folder: Path,
    bundle: Path,
    sites: Mapping[str, Path],
    seed: int,
    texts: Mapping[str, SiteText],
) -> dict[str, float]:
    told = [*SETTINGS, f"rounds={ROUNDS}", f"local.steps={STEPS}", f"seed={seed}", f"lora.seed={seed}"]
    run = folder / "run"
    with Federation(folder, bundle, sites, Path("deploy/flower")) as federation:
        federation.federate("run", str(run), *(word for item in told for word in ("--set", item)))
    model = house.model(seed)
    load_factors(model.shards, LoraFactors.load(run / "adapter.safetensors").tensors)
    return _losses(model, texts)


def _pooled(texts: Mapping[str, SiteText]) -> SiteText:
    return SiteText(np.concatenate([text.training for text in texts.values()]), np.empty(0, np.int64))


def _losses(model: SiteModel, texts: Mapping[str, SiteText]) -> dict[str, float]:
    """Nats a token on each site's held-out text."""
    return {
        site: evaluate(model, text.evaluation(LOCAL.sequences, LOCAL.length, _BATCHES))
        for site, text in texts.items()
    }


def _gain(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    return statistics.mean(before[site] - after[site] for site in before)
