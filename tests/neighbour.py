"""A session of an honest device beside whatever else a test does to the tiers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np

from tests.wire import Peer, Talk
from trifold.shared.runtime.codec import Rows
from trifold.shared.runtime.monolith import Monolith


class Neighbour:
    """Goes on step by step, and begins anew where its positions end; every bit is the monolith's."""

    def __init__(self, peer: Peer, monolith: Monolith) -> None:
        self._peer = peer
        self._talk: Talk | None = None
        self._position = 0
        self._positions = min(256, monolith.manifest.serving.spec.max_positions)
        self._tokens = np.random.default_rng(7).integers(0, monolith.edge.vocab, self._positions)
        self._digest = monolith.manifest.serving_digest
        session = monolith.session(self._positions)
        session.feed(self._tokens, 0, 0)
        self._expected: Rows = session.rows
        self._codec = monolith.codec

    async def step(self) -> None:
        if self._talk is None:
            self._talk, self._position = self._peer.call(), 0
            await self._talk.open(self._digest, self._positions)
        position = self._position
        await self._talk.send_tokens(self._tokens[position : position + 1], position)
        result = await self._talk.result()
        row = self._codec.decode(result.rows, 1, position)
        assert np.array_equal(row[0], self._expected[position]), f"position {position}"
        self._position += 1
        if self._position == self._positions:
            await self.close()

    async def close(self) -> None:
        if self._talk:
            await self._talk.close()
            self._talk = None


@asynccontextmanager
async def neighbour(edge: str, monolith: Monolith) -> AsyncIterator[Neighbour]:
    """Of the edge at HOST:PORT."""
    async with Peer.at(edge, "EdgeService") as peer:
        honest = Neighbour(peer, monolith)
        await honest.step()
        yield honest
        await honest.close()
