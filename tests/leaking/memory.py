"""The memory of processes over the sessions that they serve, and how it grows with each."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from statistics import median
from time import monotonic
from typing import Final

from tests.leaking.sessions import Callers
from tests.memory import anonymous
from tests.site import Service
from tests.wire import Peer
from trifold.shared.bundle.folder import TierFolder

LOOKS: Final = 40
_TIDYING: Final = 0.5
"""Seconds that a process gets to collect its garbage."""

WARM: Final = 0.25
"""The part of all sessions in which caches fill and arenas are laid out."""


async def slopes(service: Service, count: int) -> Mapping[str, float]:
    """Bytes that each process of a site grows by with every session of its own, over `count` sessions.

    The median of the slopes between any two looks (Theil and Sen): a step that one look sees is no slope.
    A look waits until the tiers hold no session, and has the processes, which run under
    `tests.leaking.observed`, collect their garbage.
    """
    digest = TierFolder.open(service.tiers.bundle, "edge").manifest.serving_digest
    pids = {"core": service.tiers.pid("cloud"), "edge": service.tiers.pid("edge"), "service": service.pid}
    looks: dict[str, list[int]] = {name: [] for name in pids}
    each, share = -(-count // LOOKS), {"core": 1.0, "edge": 1.0, "service": 1.0}
    for _ in range(LOOKS):
        async with Callers.of(service, digest) as callers:
            await callers.have(each)
            share["service"] = len(callers.of_service) / len([*callers.of_tiers, *callers.of_service])
        await _nothing_held(service)
        for pid in pids.values():
            os.kill(pid, signal.SIGUSR1)
        await asyncio.sleep(_TIDYING)
        for name, pid in pids.items():
            looks[name].append(anonymous(pid))
    for name, bytes_ in looks.items():
        kilobytes = " ".join(f"{value >> 10}" for value in bytes_)
        print(f"{name}, KiB after every {each}: {kilobytes}", file=sys.stderr, flush=True)
    warm = round(LOOKS * WARM)
    return {name: _slope(bytes_[warm:]) / (each * share[name]) for name, bytes_ in looks.items()}


async def _nothing_held(service: Service) -> None:
    until = monotonic() + 60
    async with (
        Peer.at(service.tiers.edge, "EdgeService") as edge,
        Peer.at(service.tiers.core, "CoreService") as core,
    ):
        while (await edge.describe()).sessions or (await core.describe()).sessions:
            assert monotonic() < until, "sessions are held that nobody has"
            await asyncio.sleep(0.05)


def _slope(values: Sequence[int]) -> float:
    return median(_slopes(values))


def _slopes(values: Sequence[int]) -> Iterator[float]:
    for (early, before), (late, after) in combinations(enumerate(values), 2):
        yield (after - before) / (late - early)
