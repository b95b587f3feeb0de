"""Prefixes: what sessions of one tenant that begin alike need not compute again.

Rows that are the same behind rows that are the same give the same keys, values and rows, as an exact engine
gives every row the same bits in whatever company. So blocks of them are kept by a digest of all rows up to
their end, as vLLM's prefix caching does by tokens, which never come here.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np

from trifold.cloud.core.batching import FEW_ROWS
from trifold.cloud.core.engines.engine import Cache, Copying, Engine
from trifold.cloud.core.kv.blocks import BLOCK
from trifold.shared.runtime.shard import Rows
from trifold.shared.telemetry.metrics import PREFIX_HITS, PREFIX_QUERIES


class _Kept(NamedTuple):
    block: Any
    rows: Rows
    """What came out."""


class Prefixes:
    """Blocks that were computed, within `memory` bytes: those that were of use last. Used on the engine."""

    def __init__(self, engine: Engine[Any], memory: int) -> None:
        """Nothing is shared of an engine that is not exact, or cannot copy."""
        self.engine = engine if isinstance(engine, Copying) and engine.exact else None
        # The first blocks of a cache may have more than theirs.
        block = engine.cache_bytes(3 * BLOCK) - engine.cache_bytes(2 * BLOCK)
        self._most = memory // (block + 4 * BLOCK * engine.hidden)
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()

    def begin(self, tenant: str, cache: Cache) -> Prefix | None:
        """What comes into an empty cache of the tenant; None where nothing is shared."""
        if self.engine is None or self._most == 0 or cache.have:
            return None
        return Prefix(self, self.engine, tenant, cache)

    def get(self, digest: bytes) -> _Kept | None:
        return self._kept.get(digest)

    def keep(self, digests: list[bytes], kept: _Kept | None) -> None:
        """The last of `digests` is that of `kept`, or known; the others are of the blocks before it."""
        if kept:
            self._kept[digests[-1]] = kept
        # A block is of no use without those before it, so these are to be the last to go.
        for digest in reversed(digests):
            if digest in self._kept:
                self._kept.move_to_end(digest)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)


class Prefix:
    """The rows of one session, from position 0 on as far as they came in order."""

    def __init__(self, prefixes: Prefixes, engine: Copying, tenant: str, cache: Cache) -> None:
        self._prefixes = prefixes
        self._engine = engine
        self._cache = cache
        self._digests: list[bytes] = []
        self._seed = sha256(tenant.encode()).digest()
        self._tail: list[tuple[Rows, Rows]] = []
        """Rows behind the last block, given and got: (n, hidden) each."""
        self._tail_rows = 0

    def find(self, rows: Rows, base_pos: int) -> Rows:
        """What comes of the first of these rows, as far as it is known; the cache holds them then."""
        if len(rows) <= FEW_ROWS:
            return rows[:0]  # a token, perhaps with drafts
        PREFIX_QUERIES.inc(len(rows))
        found: list[Rows] = []
        at = 0
        while self._goes_on(base_pos + at):
            missing = BLOCK - self._tail_rows
            if missing <= 0 or len(rows) - at < missing:
                break
            digest = self._digest([given for given, _ in self._tail] + [rows[at : at + missing]])
            kept = self._prefixes.get(digest)
            if kept is None:
                break
            self._engine.paste_block(self._cache, len(self._digests), kept.block)
            self._digests.append(digest)
            self._cut_tail(0)
            found.append(kept.rows[-missing:])
            at += missing
        if found:
            self._prefixes.keep(self._digests, None)
            PREFIX_HITS.inc(at)
            return np.concatenate(found)
        return rows[:0]

    def add(self, given: Rows, base_pos: int, got: Rows) -> None:
        """Rows that were computed, and what came of them."""
        if not self._goes_on(base_pos):
            return
        self._tail.append((given, got))
        self._tail_rows += len(given)
        # Until the one behind it is full, too, a block may have rows of a draft that are rejected yet.
        spare = 0 if len(given) >= BLOCK else BLOCK
        while self._tail_rows >= BLOCK + spare:
            self._offer()

    @property
    def _start(self) -> int:
        """Of the tail."""
        return len(self._digests) * BLOCK

    def _goes_on(self, base_pos: int) -> bool:
        """Forgets what rows from there on replace; whether they follow what is known then."""
        if base_pos < self._start + self._tail_rows:
            self._cut_tail(max(0, base_pos - self._start))
            del self._digests[base_pos // BLOCK :]
        return base_pos == self._start + self._tail_rows

    def _cut_tail(self, rows: int) -> None:
        """Keeps so many rows of it."""
        while self._tail_rows > rows:
            given, got = self._tail.pop()
            self._tail_rows -= len(given)
            if (wanted := rows - self._tail_rows) > 0:
                self._tail.append((given[:wanted], got[:wanted]))
                self._tail_rows += wanted

    def _offer(self) -> None:
        """The first block of the tail, to others."""
        given = np.concatenate([given for given, _ in self._tail])
        got = np.concatenate([got for _, got in self._tail])
        digest = self._digest([given[:BLOCK]])
        number = len(self._digests)
        self._digests.append(digest)
        known = self._prefixes.get(digest) is not None
        block = None if known else self._engine.copy_block(self._cache, number)
        self._prefixes.keep(self._digests, None if known else _Kept(block, got[:BLOCK].copy()))
        self._tail_rows -= BLOCK
        self._tail = [(given[BLOCK:].copy(), got[BLOCK:].copy())] if self._tail_rows else []

    def _digest(self, rows: list[Rows]) -> bytes:
        """Of these rows, BLOCK in all, behind all blocks before."""
        hashed = sha256(self._digests[-1] if self._digests else self._seed)
        for some in rows:
            hashed.update(np.ascontiguousarray(some).data)
        return hashed.digest()
