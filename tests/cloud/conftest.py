"""A core that runs, and somebody who speaks to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.tiers import RunningCore, running_core
from tests.wire import Peer


@pytest.fixture
async def core(bundle: Path) -> AsyncIterator[RunningCore]:
    async with running_core(bundle) as core:
        yield core


@pytest.fixture
async def peer(core: RunningCore) -> AsyncIterator[Peer]:
    async with Peer.at(core.address, "CoreService") as peer:
        yield peer
