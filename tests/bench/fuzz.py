"""Malformed frames at every RPC of every service, over processes of their own; see tests/fuzzing.

Each RPC is fuzzed until so many calls with something malformed in them were refused. Functions are those of
the files that its calls go through; some are of the other end, of starting or of stopping, and are not
entered. Of those that are, the lines and the steps between them that are reached guide the mutations.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from tests.bench.nano import CHECKPOINT
from tests.fuzzing.fuzzer import Fuzzer, Report, Target
from tests.fuzzing.reach import Reach
from tests.fuzzing.targets import authority, generation, tier, training
from trifold.cloud.split.split import split
from trifold.shared.bundle.manifest import Cuts
from trifold.shared.model.checkpoint import Checkpoint

FRAMES: Final = 10_000

Service = Callable[[], AbstractAsyncContextManager[list[Target]]]


def main(count: int = FRAMES) -> None:
    """Until `count` were refused by each RPC."""
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder:
        faults = asyncio.run(_fuzz(Path(folder), count))
    if faults:
        sys.exit(f"{faults} faults")


async def _fuzz(folder: Path, count: int) -> int:
    """The number of faults."""
    bundle = folder / "bundle"
    split(Checkpoint.open(CHECKPOINT), Cuts(edge=2, cloud=5), bundle, train=True)
    services: dict[str, Service] = {
        "edge": partial(tier, "edge", bundle, folder),
        "core": partial(tier, "cloud", bundle, folder),
        "training process": partial(training, bundle, folder),
        "service of a site": partial(generation, bundle, folder),
        "authority, over TLS": partial(authority, folder),
    }
    print("| RPC | refused | of | slowest answer, s | steps of a neighbour, equal | kept | faults |")
    print("|---|---|---|---|---|---|---|")
    faults, shares = 0, []
    for name, service in services.items():
        async with service() as targets:
            reports = [await _report(target, count) for target in targets]
        faults += sum(len(report.faults) for report in reports)
        shares.append(_share(name, targets[0].reach, reports))
    print("\n| service | functions entered | their lines | reached by honest calls | by all |")
    print("|---|---|---|---|---|")
    print("\n".join(shares))
    return faults


async def _report(target: Target, count: int) -> Report:
    report = await Fuzzer(target).run(count)
    figures = [target.name, f"{report.refused:,}", f"{report.tried:,}", f"{report.slowest:.2f}"]
    figures += [f"{report.steps:,}", str(report.corpus), str(len(report.faults))]
    print(f"| {' | '.join(figures)} |", flush=True)
    _tell(f"{target.name}: {dict(report.reasons)}; slow but once: {report.slow_once}")
    for fault in report.faults:
        _tell(f"  FAULT {fault[:3000]}")
    return report


def _share(name: str, reach: Reach, reports: Sequence[Report]) -> str:
    """A row of the second table. What nothing reached is told, too."""
    honest = np.any([report.by_seeds for report in reports], axis=0)
    reached = np.any([report.reached for report in reports], axis=0)
    functions = reach.functions()
    entered = {name: lines for name, lines in functions.items() if np.any(lines & reached)}
    for function, lines in entered.items():
        if np.any(lines & ~reached):
            _tell(f"  {name}, not reached: {function}, {reach.numbers(lines & ~reached)}")
    _tell(f"  {name}, not entered: {' '.join(functions.keys() - entered.keys())}")
    lines = np.any([*entered.values()], axis=0)
    shares = [f"{(lines & part).sum() / lines.sum():.0%}" for part in (honest, reached)]
    return f"| {name} | {len(entered)} of {len(functions)} | {lines.sum()} | {' | '.join(shares)} |"


def _tell(line: str) -> None:
    """On stderr: the tables go to the documentation."""
    print(line, file=sys.stderr, flush=True)
