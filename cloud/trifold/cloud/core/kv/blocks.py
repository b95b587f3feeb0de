"""BlockPool: the memory of all KV caches, in blocks of some positions each (vLLM, arXiv 2309.06180)."""

from __future__ import annotations

from collections import deque
from threading import Lock
from typing import Final

from trifold.cloud.core.kv.table import BlockTable
from trifold.shared.errors import Overloaded

BLOCK: Final = 64
"""Positions of a block. It is also what attention takes at a time, so that sums are always cut alike."""

NOBODYS: Final = 0
"""The block that no session has: what is written or read for padding goes there."""


def blocks_of(positions: int) -> int:
    """How many blocks so many positions take."""
    return -(-positions // BLOCK)


class BlockPool:
    """Numbers of blocks, each in one table at most; any thread may reserve and release.

    Blocks are reserved when a session opens, for all positions it may come to hold, so that none that was
    admitted runs out of them. What lies in a block is the engine's affair.
    """

    def __init__(self, count: int) -> None:
        """So many blocks, besides NOBODYS."""
        self.count = count
        self._free = deque(range(NOBODYS + 1, NOBODYS + 1 + count))
        self._reserving = Lock()

    @property
    def free(self) -> int:
        return len(self._free)

    def reserve(self, capacity: int) -> BlockTable:
        """An empty table for the positions [0, capacity). Raises Overloaded when there are too few blocks."""
        wanted = blocks_of(capacity)
        with self._reserving:
            if wanted > len(self._free):
                raise Overloaded(f"{capacity} positions take {wanted} blocks of KV, {self.free} are free")
            blocks = tuple(self._free.popleft() for _ in range(wanted))
        # Without the lock: a table that nobody holds gives its blocks back wherever Python finds that out.
        return BlockTable(capacity, BLOCK, blocks, self._free.extend)
