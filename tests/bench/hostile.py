"""A hostile site among five: what a strategy makes of updates whose sign is flipped, by held-out loss.

The federation is the real one. Behind the hostile site's node stands its honest trainer, and between them a
process that negates every update. The flipped update has the shape and the norm of an honest one, so the gate
lets it through: it is the strategy that must do without it. The loss is the mean of all five sites' held-out
loss with the run's last factors.

The sites' texts are alike (the demo's documents of all three kinds, dealt out in turn) or apart: two sites
with code, two with manual pages, one with prose. Apart, updates of different kinds are nearly orthogonal, and
of two sites that contradict each other nobody can tell which one is hostile.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Final

from tests.bench.nano import CHECKPOINT
from tests.network.hostile import HostileTrainer
from trifold.cloud.federation.metrics import read
from trifold.cloud.federation.settings import StrategyName
from trifold.cloud.split.split import split
from trifold.device.demo.federated.command import SETTINGS
from trifold.device.demo.federated.federation import Federation
from trifold.device.demo.federated.texts import write_texts
from trifold.edge.federation.frames import Record
from trifold.shared.bundle.manifest import Cuts
from trifold.shared.model.checkpoint import Checkpoint

SEEDS: Final = (0, 1, 2)
ROUNDS: Final = 6
STEPS: Final = 8
HOSTILE: Final = "site-4"
STRATEGIES: Final[tuple[StrategyName, ...]] = ("krum", "trimmed-mean", "fedavg")

_SIGN: Final = 35
"""The byte of a packed update with the sign of its peak, of which all its scales are fractions."""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder:
        root = Path(folder)
        bundle = root / "bundle"
        split(Checkpoint.open(CHECKPOINT), Cuts(edge=2, cloud=5), bundle, train=True)
        print("| texts | strategy | seed | all honest | one of five flips signs | difference |")
        print("|---|---|---|---|---|---|")
        documents = write_texts(root / "texts")
        for texts, sites in (("alike", alike(root, documents)), ("apart", apart(root, documents))):
            federation = Federation(root / f"federation-{texts}", bundle, sites, Path("deploy/flower"))
            with federation, HostileTrainer(federation.folder / HOSTILE / "trainer.sock", dict) as hostile:
                for strategy, seed in product(STRATEGIES, SEEDS):
                    hostile.spoil = dict
                    honest = _loss(federation, root / f"{texts}-{strategy}-{seed}-honest", strategy, seed)
                    hostile.spoil = flipped
                    spoilt = _loss(federation, root / f"{texts}-{strategy}-{seed}-hostile", strategy, seed)
                    shown = f"{honest:.4f} | {spoilt:.4f} | {spoilt / honest - 1:+.2%}"
                    print(f"| {texts} | {strategy} | {seed} | {shown} |", flush=True)


def flipped(answer: Record) -> Record:
    data = bytearray(answer["data"])
    data[_SIGN] ^= 0x80
    return answer | {"data": bytes(data)}


def _loss(federation: Federation, run: Path, strategy: StrategyName, seed: int) -> float:
    told = [*SETTINGS, "sites=5", "quorum=5", f"rounds={ROUNDS}", f"local.steps={STEPS}"]
    told += [f"strategy={strategy}", f"seed={seed}", f"lora.seed={seed}"]
    federation.federate("run", str(run), *(word for item in told for word in ("--set", item)))
    last = next(event for event in read(run) if event["event"] == "evaluation")
    return statistics.mean(float(report["heldout"]) for report in last["sites"].values())


def alike(root: Path, documents: Mapping[str, Path]) -> dict[str, Path]:
    """Five sites, to which the documents of all kinds are dealt out in turn."""
    sites = {f"site-{number}": root / "alike" / f"site-{number}" for number in range(5)}
    for kind in documents:
        for site, folder in enumerate(sites.values()):
            _deal(documents, kind, folder, site, 5)
    return sites


def apart(root: Path, documents: Mapping[str, Path]) -> dict[str, Path]:
    """Two sites with code, prose at one, and two with manual pages, of which the last is the hostile one."""
    sites = {f"site-{number}": root / "apart" / f"site-{number}" for number in range(5)}
    shares = [("code", 0, 2), ("code", 1, 2), ("prose", 0, 1), ("manual", 0, 2), ("manual", 1, 2)]
    for folder, (kind, first, step) in zip(sites.values(), shares, strict=True):
        _deal(documents, kind, folder, first, step)
    return sites


def _deal(documents: Mapping[str, Path], kind: str, folder: Path, first: int, step: int) -> None:
    """Every `step`th document of a kind, from the one numbered `first` on, to a site's folder."""
    for part in ("train", "heldout"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for document in sorted((documents[kind] / part).iterdir())[first::step]:
            shutil.copy(document, folder / part / f"{kind}-{document.name}")
