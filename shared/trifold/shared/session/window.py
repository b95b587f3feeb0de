"""The steps in flight on one stream: come, and not answered yet."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple

from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import InvalidRequest
from trifold.shared.session.scheduler import Turn


class Encoded(NamedTuple):
    """The rows of a step, for the wire; so many of its positions were `reused` instead of computed."""

    rows: bytes
    reused: int = 0


@dataclass(slots=True)
class Passage:
    """One step on its way through a tier.

    `turn` gives what the tier makes of it, or None when the step had become stale.
    """

    header: pb.Header
    turn: asyncio.Future[Turn[Encoded | None]]
    arrived_ns: int
    bytes_up: int = 0


class Window:
    """Never more than `size` steps at a time; `used_at` is when it was opened, or one was last answered."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.unanswered = 0
        self.used_at = asyncio.get_running_loop().time()

    def come(self) -> None:
        """Raises InvalidRequest for a caller who does not wait for answers."""
        if self.unanswered == self._size:
            raise InvalidRequest(f"more than the agreed {self._size} steps are unanswered: wait for results")
        self.unanswered += 1

    def answered(self) -> None:
        """To be called ahead of writing an answer: its reader may be faster than the writer's return."""
        self.unanswered -= 1
        self.used_at = asyncio.get_running_loop().time()


class Lane:
    """Passages that `handle` gets one after the other, in the order they came."""

    def __init__(self, handle: Callable[[Passage], Awaitable[None]]) -> None:
        self._handle = handle
        self._waiting = 0
        self._queue: asyncio.Queue[Passage | None] = asyncio.Queue()

    def put(self, passage: Passage) -> None:
        """Leaves it to run()."""
        self._waiting += 1
        self._queue.put_nowait(passage)

    async def pass_on(self, passage: Passage) -> None:
        """Handles it here and now where it is computed and nothing is ahead of it: a step of one row mostly.

        Only one task may call this. To wake another one takes a good part of what a token costs on loopback.
        """
        if self._waiting or not passage.turn.done():
            self.put(passage)
        else:
            await self._handle(passage)

    async def run(self) -> None:
        """Handles what was put, until there will be no more."""
        while (passage := await self._queue.get()) is not None:
            await self._handle(passage)
            self._waiting -= 1

    def finish(self) -> None:
        """Says that no more passages will come."""
        self._queue.put_nowait(None)
