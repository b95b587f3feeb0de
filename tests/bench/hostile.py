"""A hostile site among five: what a strategy makes of updates whose sign is flipped, by held-out loss.

The federation is the real one. Behind the hostile site's node stands its honest trainer, and between them a
process that negates every update. The flipped update has the shape and the norm of an honest one, so the gate
lets it through: it is the strategy that must do without it. The loss is the mean of all five sites' held-out
loss with the run's last factors.
"""

from __future__ import annotations

import statistics
import tempfile
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
HOSTILE: Final = "manual-2"
STRATEGIES: Final[dict[StrategyName, tuple[str, ...]]] = {
    "trimmed-mean": (),
    "fedavg": (),
    "krum": ("options.num_nodes_to_select=3",),
}
"""By name, with the settings that are not the defaults."""

_SIGN: Final = 35
"""The byte of a packed update with the sign of its peak, of which all its scales are fractions."""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder:
        root = Path(folder)
        bundle = root / "bundle"
        split(Checkpoint.open(CHECKPOINT), Cuts(edge=2, cloud=5), bundle, train=True)
        sites = _sites(root / "texts")
        print("| strategy | seed | all honest | one of five flips signs | difference |")
        print("|---|---|---|---|---|")
        federation = Federation(root / "federation", bundle, sites, Path("deploy/flower"))
        with federation, HostileTrainer(federation.folder / HOSTILE / "trainer.sock", dict) as hostile:
            for strategy, seed in product(STRATEGIES, SEEDS):
                hostile.spoil = dict
                honest = _loss(federation, root / f"{strategy}-{seed}-honest", strategy, seed)
                hostile.spoil = flipped
                spoilt = _loss(federation, root / f"{strategy}-{seed}-hostile", strategy, seed)
                shown = f"{honest:.4f} | {spoilt:.4f} | {spoilt / honest - 1:+.2%}"
                print(f"| {strategy} | {seed} | {shown} |", flush=True)


def flipped(answer: Record) -> Record:
    data = bytearray(answer["data"])
    data[_SIGN] ^= 0x80
    return answer | {"data": bytes(data)}


def _loss(federation: Federation, run: Path, strategy: StrategyName, seed: int) -> float:
    told = [*SETTINGS, "sites=5", "quorum=5", f"rounds={ROUNDS}", f"local.steps={STEPS}"]
    told += [f"strategy={strategy}", *STRATEGIES[strategy], f"seed={seed}", f"lora.seed={seed}"]
    federation.federate("run", str(run), *(word for item in told for word in ("--set", item)))
    last = next(event for event in read(run) if event["event"] == "evaluation")
    return statistics.mean(float(report["heldout"]) for report in last["sites"].values())


def _sites(folder: Path) -> dict[str, Path]:
    """The demo's three sites, of which two are halved: every other document of theirs goes to a second."""
    sites = write_texts(folder)
    for site in ("code", "manual"):
        for part in ("train", "heldout"):
            second = folder / f"{site}-2" / part
            second.mkdir(parents=True)
            for document in sorted((sites[site] / part).iterdir())[::2]:
                document.rename(second / document.name)
        sites[f"{site}-2"] = folder / f"{site}-2"
    return sites
