"""What the tests of the core share: sessions with something in them, and the rows that must come out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.tiers import RunningCore, shard
from tests.wire import Peer, Talk
from trifold.shared.runtime.codec import RowCodec, Rows

LENGTH = 24


def codec_of(core: RunningCore) -> RowCodec:
    return core.service.frames.codec


def digest_of(core: RunningCore) -> str:
    return core.service.frames.digest


def some_rows(core: RunningCore, seed: int = 0, length: int = LENGTH) -> Rows:
    return np.random.default_rng(seed).standard_normal((length, codec_of(core).hidden), np.float32)


def expected(core: RunningCore, rows: Rows) -> Rows:
    """What a device must get for the rows of an edge, by the shard itself and in one piece."""
    codec, own = codec_of(core), shard(core.bundle, "cloud")
    arrived = codec.decode(codec.encode(rows, 0), len(rows), 0)
    out = own.run(own.cache(len(rows)), arrived, 0)
    return codec.decode(codec.encode(out, 0), len(rows), 0)


async def settled(condition: Callable[[], bool]) -> None:
    """Waits until the service has noticed."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - the service has no event for a test
            await asyncio.sleep(0.005)


async def opened(core: RunningCore, peer: Peer, held: int = 0, **fields: Any) -> Talk:
    """A stream whose session holds so many positions."""
    talk = peer.call()
    await talk.open(digest_of(core), **fields)
    if held:
        await talk.send_rows(codec_of(core), some_rows(core)[:held], 0)
        await talk.result()
    return talk
