"""Engine: what computes the core, for many sessions at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

from trifold.shared.bundle.manifest import Tier
from trifold.shared.errors import InvalidRequest, OutOfSequence
from trifold.shared.runtime.shard import Rows


class Cache(Protocol):
    """Keys and values of the positions [0, have) of a session, with room for `capacity`."""

    capacity: int
    have: int


C = TypeVar("C", bound=Cache)
C_co = TypeVar("C_co", bound=Cache, covariant=True)


@dataclass(frozen=True, slots=True)
class Part(Generic[C_co]):
    """What a session has in a batch: rows (n, hidden) in fp32 for the positions from `base_pos` on."""

    cache: C_co
    rows: Rows
    base_pos: int


class Engine(Protocol[C]):
    """A core, loaded and tested. `exact`: the self-test found that no row depends on its neighbours.

    cache() and run() are called by one thread at a time, though not always the same; the others by any.
    """

    tier: Tier
    hidden: int
    most_rows: int
    provider: str
    fingerprint: str
    exact: bool

    def cache_bytes(self, capacity: int) -> int:
        """Memory of a cache for so many positions."""
        ...

    def cache(self, capacity: int) -> C:
        """An empty cache for the positions [0, capacity)."""
        ...

    def release(self, cache: C) -> None:
        """Takes the memory of a cache back, for caches that are made from now on; a turn may still use it."""
        ...

    def run(self, batch: Sequence[Part[C]]) -> list[Rows]:
        """The rows of every part behind the core's layers, in new memory.

        At most `most_rows` in all, no two parts of one cache; a cache forgets what it held behind base_pos.
        Raises what check() does, before anything is computed.
        """
        ...


@runtime_checkable
class Copying(Protocol):
    """An engine that copies its caches by blocks, of BLOCK positions each; on the thread of run()."""

    def copy_block(self, cache: Any, number: int) -> Any:
        """Keys and values of the positions from `number` * BLOCK on, all of which the cache holds."""
        ...

    def paste_block(self, cache: Any, number: int, block: Any) -> None:
        """Puts there what copy_block() gave of any cache; this one then holds all up to the block's end.

        Raises Cancelled for a cache that was released.
        """
        ...


def check(part: Part[Cache], hidden: int) -> None:
    """Raises OutOfSequence when positions before a part are missing, InvalidRequest for what cannot be."""
    rows, cache, end = part.rows, part.cache, part.base_pos + len(part.rows)
    if len(rows) == 0 or rows.shape[1:] != (hidden,) or rows.dtype != np.float32:
        raise InvalidRequest(f"the core takes float32 (n, {hidden}), not {rows.dtype.name} {rows.shape}")
    if part.base_pos < 0 or end > cache.capacity:
        raise InvalidRequest(f"positions {part.base_pos} to {end - 1} in a session of {cache.capacity}")
    if part.base_pos > cache.have:
        raise OutOfSequence(
            f"rows from position {part.base_pos} on, but only {cache.have} positions are here"
        )
