"""A federated round over links of 20 Mbit/s: bytes, loss and share of time spent on the way, against fp32.

The fp32 form sends rows, gradients and updates in fp32. Each site has links of its own to training process
and to Flower, 20 Mbit/s in each direction, made by a proxy. The share of a round that communication takes is
by how much it is shorter without that limit.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.bench.nano import CHECKPOINT
from tests.network.ways import Ways
from trifold.cloud.federation.metrics import Event, read
from trifold.cloud.split.split import split
from trifold.device.demo.federated.command import SETTINGS
from trifold.device.demo.federated.federation import Federation
from trifold.device.demo.federated.texts import write_texts
from trifold.shared.bundle.manifest import CodecName, Cuts
from trifold.shared.model.checkpoint import Checkpoint

ROUNDS: Final = 4
STEPS: Final = 12
BANDWIDTH: Final = 20e6 / 8
"""Bytes a second."""

_WAYS: Final = ("rows_up", "rows_down", "gradients_up", "gradients_down", "update_up", "update_down")


@dataclass(frozen=True)
class Form:
    """What rows and gradients travel as, and updates."""

    name: str
    codec: CodecName
    update: str


FORMS: Final = (Form("fp32", "none", "fp32"), Form("int8", "int8", "int8"))


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder:
        root = Path(folder)
        sites = write_texts(root / "texts")
        print(
            "| form | MB a round | update, KB a site | held-out loss | free, s | 20 Mbit/s, s | on the way |"
        )
        print("|---|---|---|---|---|---|---|")
        for form in FORMS:
            bundle = root / f"bundle-{form.name}"
            split(Checkpoint.open(CHECKPOINT), Cuts(edge=2, cloud=5), bundle, codec=form.codec, train=True)
            free = _run(root / f"{form.name}-free", bundle, sites, form)
            narrow = _run(root / f"{form.name}-narrow", bundle, sites, form, bandwidth=BANDWIDTH)
            rounds = [event for event in narrow if event["event"] == "round"]
            volume = statistics.mean(_sum(row, *_WAYS) for row in rounds) / 1e6
            update = statistics.mean(_sum(row, "update_up") / len(row["sites"]) for row in rounds) / 1e3
            losses = next(event["sites"] for event in narrow if event["event"] == "evaluation")
            loss = statistics.mean(report["heldout"] for report in losses.values())
            slow, fast = _seconds(narrow), _seconds(free)
            row = (
                f"{volume:.1f} | {update:.1f} | {loss:.4f} | {fast:.1f} | {slow:.1f} | {1 - fast / slow:.0%}"
            )
            print(f"| {form.name} | {row} |", flush=True)


def _run(folder: Path, bundle: Path, sites: dict[str, Path], form: Form, **link: Any) -> list[Event]:
    told = [*SETTINGS, f"rounds={ROUNDS}", f"local.steps={STEPS}"]
    told += [f"local.gradients={form.codec}", f"update={form.update}"]
    with Ways(**link) as ways, Federation(folder, bundle, sites, Path("deploy/flower"), ways) as federation:
        federation.federate("run", str(folder / "run"), *(word for item in told for word in ("--set", item)))
    return list(read(folder / "run"))


def _seconds(events: list[Event]) -> float:
    """Of a round, median."""
    return statistics.median(float(event["seconds"]) for event in events if event["event"] == "round")


def _sum(row: Event, *names: str) -> int:
    return sum(int(report[name]) for report in row["sites"].values() for name in names)
