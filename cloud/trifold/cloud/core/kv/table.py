"""BlockTable: where the keys and values of one session lie."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence


class BlockTable:
    """The blocks of the positions [0, capacity), of which [0, have) hold something.

    Position p lies in block p // size, at place p % size.
    """

    def __init__(
        self,
        capacity: int,
        size: int,
        blocks: Sequence[int],
        give_back: Callable[[Sequence[int]], object],
    ) -> None:
        """`give_back` gets the blocks once: when they are released or, at the latest, when the table ends."""
        self.capacity = capacity
        self.size = size
        self.have = 0
        self.blocks = blocks
        self._release = weakref.finalize(self, give_back, blocks)

    def truncate(self, base_pos: int) -> None:
        """Forgets what lies at `base_pos` and behind it; the blocks stay reserved."""
        self.have = min(self.have, base_pos)

    @property
    def released(self) -> bool:
        """Whether the blocks may be another's."""
        return not self._release.alive

    def release(self) -> None:
        """Gives the blocks back; any thread may, and more than once."""
        self._release()
