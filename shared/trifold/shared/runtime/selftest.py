"""The self-test of a shard: on this machine, do its rows depend on how they are cut into calls?"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from trifold.shared.runtime.shard import Rows, Shard

ROWS: Final = 140

CHUNKINGS: Final = (
    (1, 1, 1, 2, 3, 5, 16, 36, 1, 63, 1, 10),
    (64, 65, 11),
    (5, 123, 1, 1, 10),
)
"""Single rows at the start, around 64 and around 128, where kernels change tiles; small and large parts."""


@dataclass(frozen=True)
class SelfTest:
    """`exact`: every chunking gave the bits of one call. `digest`: of those bits, 16 hex digits."""

    exact: bool
    digest: str


def prove(shard: Shard) -> SelfTest:
    """Compute the same rows in one call and in several, in caches of other sizes, and compare every bit."""
    inputs = _inputs(shard)
    whole = _run(shard, inputs, (len(inputs),))
    finite = bool(np.isfinite(whole).all())
    exact = finite and all(
        np.array_equal(_run(shard, inputs, chunks, spare=7 * number), whole)
        for number, chunks in enumerate(CHUNKINGS)
    )
    return SelfTest(exact, hashlib.sha256(whole.tobytes()).hexdigest()[:16])


def _run(shard: Shard, inputs: NDArray[Any], chunks: tuple[int, ...], spare: int = 0) -> Rows:
    cache = shard.cache(len(inputs) + spare)
    out, start = [], 0
    for size in chunks:
        part = inputs[start : start + size]
        if len(part):
            out.append(shard.run(cache, part, start))
        start += size
    return np.concatenate(out)


def _inputs(shard: Shard) -> NDArray[Any]:
    """Random token ids or rows. One row is a thousand times larger, as the first of a text often is."""
    rows = min(ROWS, shard.spec.max_positions)
    random = np.random.Generator(np.random.Philox(key=rows))
    if shard.tier == "edge":
        return random.integers(0, shard.vocab, rows)
    values = random.standard_normal((rows, shard.hidden), np.float32)
    values[0] *= 1000
    return values
