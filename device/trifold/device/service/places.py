"""The places for answers: so many at a time, and a line that is only as long as is worth waiting in."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from trifold.shared.errors import Overloaded
from trifold.shared.session.turnover import Turnover


class Places:
    """`count` places, taken in the order of coming.

    Whoever would wait for longer than `patience` seconds, going by how long places have been held of late, is
    refused at once.
    """

    def __init__(self, count: int, patience: float) -> None:
        self.count = count
        self.free = count
        self._patience = patience
        self._line: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._turnover = Turnover()

    @property
    def running(self) -> int:
        """Places taken."""
        return self.count - self.free

    @property
    def waiting(self) -> int:
        """Places that are waited for; any thread may ask."""
        return sum(wanted for wanted, _ in [*self._line])

    def check(self, wanted: int = 1) -> None:
        """Raises Overloaded, saying when to come again, where waiting for so many places is not worth it."""
        missing = self.waiting + min(wanted, self.count) - self.free
        wait = missing / self.count * self._turnover.seconds
        if wait > self._patience:
            raise Overloaded(
                f"too many ask at a time: {self.running} answers are being given, and {self.waiting} wait",
                retry_after=wait,
            )

    @asynccontextmanager
    async def taken(self, wanted: int = 1) -> AsyncIterator[None]:
        """Waits for so many places, or all of them, and holds them. Raises Overloaded as check() does."""
        self.check(wanted)
        wanted = min(wanted, self.count)
        if self._line or self.free < wanted:
            await self._wait(wanted)
        else:
            self.free -= wanted
        began = asyncio.get_running_loop().time()
        try:
            yield
            self._turnover.note(asyncio.get_running_loop().time() - began)
        finally:
            self._give_back(wanted)

    async def _wait(self, wanted: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append((wanted, turn))
        try:
            await turn
        except asyncio.CancelledError:
            # It may have its places without knowing it yet, or be out of the line already.
            self._line = deque(waiting for waiting in self._line if waiting[1] is not turn)
            self._give_back(0 if turn.cancelled() else wanted)
            raise

    def _give_back(self, places: int) -> None:
        self.free += places
        while self._line and (self._line[0][1].done() or self._line[0][0] <= self.free):
            wanted, turn = self._line.popleft()
            # Who was cancelled has not left the line yet, and will not take its place.
            if not turn.done():
                self.free -= wanted
                turn.set_result(None)
