"""A whole house for the tests of the edge: core, link, edge and a device's end of the wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.network.proxy import Proxy
from tests.tiers import RunningCore, RunningEdge, running_core, running_edge, shard
from tests.wire import Peer, Talk, decoded
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.runtime.codec import RowCodec, Rows
from trifold.shared.runtime.monolith import Monolith

LENGTH = 40


@cache
def monolith(bundle: Path) -> Monolith:
    manifest = TierFolder.open(bundle, "edge").manifest
    return Monolith(manifest, shard(bundle, "edge"), shard(bundle, "cloud"), shard(bundle, "device"))


class House:
    """A core, an edge before it, a proxy on the link between them, and a peer of the edge."""

    def __init__(self, bundle: Path, core: RunningCore, link: Proxy, edge: RunningEdge, peer: Peer) -> None:
        self.bundle = bundle
        self.core = core
        self.link = link
        self.edge = edge
        self.peer = peer
        self.monolith = monolith(bundle)
        self.codec: RowCodec = self.monolith.codec
        self.digest = self.monolith.manifest.serving_digest

    @classmethod
    @asynccontextmanager
    async def up(cls, bundle: Path, *, lease: float = 30.0, patience: float = 20.0) -> AsyncIterator[House]:
        async with (
            running_core(bundle, lease=lease) as core,
            Proxy(core.address) as link,
            running_edge(bundle, link.address, lease=lease, patience=patience) as edge,
            Peer.at(edge.address, "EdgeService") as peer,
        ):
            yield cls(bundle, core, link, edge, peer)

    def tokens(self, seed: int = 0) -> NDArray[np.int64]:
        return np.random.default_rng(seed).integers(0, self.monolith.edge.vocab, LENGTH)

    def expected(self, tokens: NDArray[np.int64]) -> Rows:
        """The rows that a device must get, from the monolith in one piece."""
        session = self.monolith.session(len(tokens))
        session.feed(tokens, 0, 0)
        return session.rows

    async def opened(self, held: int = 0, **fields: Any) -> Talk:
        """A stream whose session holds so many positions in both tiers."""
        talk = self.peer.call()
        await talk.open(self.digest, **fields)
        if held:
            await talk.send_tokens(self.tokens()[:held], 0)
            await talk.result()
        return talk

    async def rest(self, talk: Talk, have: int) -> None:
        """Sends what is missing from `have` on, and expects the bits of the monolith."""
        await talk.send_tokens(self.tokens()[have:], have)
        got = decoded(self.codec, await talk.result())
        assert np.array_equal(got, self.expected(self.tokens())[have:])


async def settled(condition: Callable[[], bool]) -> None:
    """Waits until the services have noticed."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - the services have no event for a test
            await asyncio.sleep(0.005)
