"""What updates travel as, what rows and gradients travel as, and how factors are averaged: by held-out loss.

Three sites and three seeds, each run through the real federation with equal optimizer steps. The loss is the
mean of the sites' held-out loss with the run's last factors; the difference is to the defaults of the same
seed.
"""

from __future__ import annotations

import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Final

from tests.bench.nano import CHECKPOINT
from trifold.cloud.federation.metrics import read
from trifold.cloud.split.split import split
from trifold.device.demo.federated.command import SETTINGS
from trifold.device.demo.federated.federation import Federation
from trifold.device.demo.federated.texts import write_texts
from trifold.shared.bundle.manifest import CodecName, Cuts
from trifold.shared.model.checkpoint import Checkpoint

SEEDS: Final = (0, 1, 2)
ROUNDS: Final = 6
STEPS: Final = 12


@dataclass(frozen=True)
class Variant:
    """Settings of a run that are not the defaults, and the codec of the bundle's rows."""

    name: str
    told: tuple[str, ...] = ()
    codec: CodecName = "int8"


VARIANTS: Final = (
    Variant("defaults: all int8, mean of factors"),
    Variant("updates in fp32", ("update=fp32",)),
    Variant("updates, rows and gradients in fp32", ("update=fp32", "local.gradients=none"), "none"),
    Variant("updates int8, 2:4", ("update=int8-2:4",)),
    Variant("mean of products (svd)", ("aggregation=svd",)),
    Variant("A frozen", ("lora.freeze_a=true",)),
)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder, ExitStack() as stack:
        root = Path(folder)
        sites = write_texts(root / "texts")
        federations = {}
        for codec in ("int8", "none"):
            bundle = root / f"bundle-{codec}"
            split(Checkpoint.open(CHECKPOINT), Cuts(edge=2, cloud=5), bundle, codec=codec, train=True)
            federation = Federation(root / f"federation-{codec}", bundle, sites, Path("deploy/flower"))
            federations[codec] = stack.enter_context(federation)
        print("| variant | seed | held-out loss | difference |")
        print("|---|---|---|---|")
        defaults: dict[int, float] = {}
        for variant, seed in product(VARIANTS, SEEDS):
            run = root / f"run-{VARIANTS.index(variant)}-{seed}"
            loss = _loss(federations[variant.codec], run, variant, seed)
            difference = loss / defaults.setdefault(seed, loss) - 1
            print(f"| {variant.name} | {seed} | {loss:.4f} | {difference:+.2%} |", flush=True)


def _loss(federation: Federation, run: Path, variant: Variant, seed: int) -> float:
    told = [*SETTINGS, f"rounds={ROUNDS}", f"local.steps={STEPS}", f"seed={seed}", f"lora.seed={seed}"]
    told += variant.told
    federation.federate("run", str(run), *(word for item in told for word in ("--set", item)))
    last = next(event for event in read(run) if event["event"] == "evaluation")
    return statistics.mean(float(report["heldout"]) for report in last["sites"].values())
