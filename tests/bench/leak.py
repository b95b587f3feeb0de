"""Memory of core, edge and a site's service over many sessions; see tests/leaking for what these are.

Twice: as they are, and with a leak planted that keeps some bytes of every session. The same check that the
former pass must catch the latter.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.bench.nano import split_nano
from tests.leaking.memory import slopes
from tests.processes import Processes
from tests.processes import Service as Tier
from tests.site import Service

SESSIONS: Final = 20_000
LEAK: Final = 300
"""Bytes of a session that the planted leak keeps."""

LIMIT: Final = 100
"""Bytes that a session may cost for ever."""

SEAMS: Final = {
    "core": "trifold.shared.session.table:Session",
    "edge": "trifold.shared.session.table:Session",
    "service": "trifold.device.client.generation:Generation",
}


def main(count: int = SESSIONS) -> None:
    """`count` sessions each time."""
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder:
        bundle = split_nano(Path(folder) / "bundle")
        honest = _slopes(bundle, Path(folder) / "honest", count, {})
        leaking = _slopes(bundle, Path(folder) / "leaking", count, SEAMS)
    print(f"| process | sessions | bytes a session | with a planted leak of {LEAK} | caught |")
    print("|---|---|---|---|---|")
    for name in honest:
        caught = "yes" if leaking[name] > LIMIT else "no"
        print(f"| {name} | {count:,} | {honest[name]:.0f} | {leaking[name]:.0f} | {caught} |")
    if max(honest.values()) > LIMIT:
        sys.exit(f"memory grows by more than {LIMIT} bytes a session")
    if min(leaking.values()) <= LIMIT:
        sys.exit("the planted leak was not caught: the check is worth nothing")


def _slopes(bundle: Path, journals: Path, count: int, seams: Mapping[str, str]) -> Mapping[str, float]:
    def interpreter(process: str) -> list[str]:
        planted = [seams[process], str(LEAK)] if process in seams else []
        return [sys.executable, "-m", "tests.leaking.observed", *planted]

    options = "--threads", "1", "--lease", "1"
    interpreters: dict[Tier, list[str]] = {"cloud": interpreter("core"), "edge": interpreter("edge")}
    with (
        Processes(bundle, *options, interpreters=interpreters) as tiers,
        Service(tiers, journals, "--threads", "1", interpreter=interpreter("service")) as service,
    ):
        return asyncio.run(slopes(service, count))
