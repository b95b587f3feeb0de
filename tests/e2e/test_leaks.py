"""Many sessions with cancels and errors leave nothing behind, and a leak that is planted is found."""

from __future__ import annotations

import asyncio
import gc
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cloud.cores import settled
from tests.leaking.sessions import Callers
from tests.tiers import running_core, running_edge
from tests.wire import Peer
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.session.table import Session

ROUND = 160
LEASE = 0.5
WARM = 3
"""Rounds in which everything has happened for the first time, on each of the servers that share a port."""
SPARE = 1.0
"""More than is ever seen: there are always things on their way to an end."""


async def blocks_a_session(bundle: Path) -> float:
    """Blocks of Python's memory that are kept for a session by both tiers and their callers together."""
    digest = TierFolder.open(bundle, "edge").manifest.serving_digest
    async with (
        running_core(bundle, lease=LEASE) as core,
        running_edge(bundle, core.address, lease=LEASE) as edge,
    ):

        async def have(count: int) -> int:
            async with Peer.at(edge.address, "EdgeService") as peer:
                callers = Callers(peer, digest)
                await callers.have(count)
            await settled(lambda: not len(edge.service.table) and not len(core.service.table))
            for _ in range(4):
                # What is collected may have an end to come to, which is garbage then.
                gc.collect()
                await asyncio.sleep(0.05)
            return sys.getallocatedblocks()

        for _ in range(WARM):
            await have(ROUND)
        looks = [await have(ROUND) for _ in range(4)]
        return (looks[-1] - looks[0]) / (3 * ROUND)


async def test_a_session_leaves_nothing_behind(bundle: Path) -> None:
    assert await blocks_a_session(bundle) < SPARE


async def test_a_leak_of_some_bytes_a_session_is_noticed(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, kept = Session.__init__, []

    def leaking(self: Session[Any], *arguments: Any, **named: Any) -> None:
        kept.append(bytes(300))
        honest(self, *arguments, **named)

    monkeypatch.setattr(Session, "__init__", leaking)
    assert await blocks_a_session(bundle) > SPARE
