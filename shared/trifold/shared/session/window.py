"""The steps in flight on one stream: come, and not answered yet."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import InvalidRequest
from trifold.shared.session.scheduler import Turn


@dataclass(slots=True)
class Passage:
    """One step on its way through a tier.

    `turn` gives the encoded rows that the tier computed, or None when the step had become stale.
    """

    header: pb.Header
    turn: asyncio.Future[Turn[bytes | None]]
    arrived_ns: int
    bytes_up: int = 0


class Window:
    """Passages in the order they came, never more than `size` at a time."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._unanswered = 0
        self._queue: asyncio.Queue[Passage | None] = asyncio.Queue()

    def put(self, passage: Passage) -> None:
        """Raises InvalidRequest for a caller who does not wait for answers."""
        if self._unanswered == self._size:
            raise InvalidRequest(f"more than the agreed {self._size} steps are unanswered: wait for results")
        self._unanswered += 1
        self._queue.put_nowait(passage)

    async def get(self) -> Passage | None:
        """The next step; None when no more will come."""
        return await self._queue.get()

    def answered(self) -> None:
        """To be called ahead of writing an answer: its reader may be faster than the writer's return."""
        self._unanswered -= 1

    def finish(self) -> None:
        """Says that no more steps will come."""
        self._queue.put_nowait(None)
