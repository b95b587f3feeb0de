"""The self-test of a shard: on this machine, do its rows depend on how they are cut into calls?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, takewhile, zip_longest
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]

Run = Callable[[Sequence[tuple[Any, NDArray[Any], int]]], Sequence[Rows]]
"""Computes parts of sessions: cache, inputs, position of the first."""

ROWS: Final = 140

CHUNKINGS: Final = (
    (1, 1, 1, 2, 3, 5, 16, 1, 17, 1, 17, 1, 24, 1, 20, 1, 17, 1, 10),
    (64, 65, 11),
    (5, 123, 1, 1, 10),
)
"""Single rows at the start, around 64 and around 128, where kernels change tiles, and in between, behind
other numbers of whole vectors; small and large parts."""

_DISTINCT: Final = 32
"""Rows that single ones in company are: each is computed alone, too."""


@dataclass(frozen=True)
class SelfTest:
    """`exact`: every chunking gave the bits of one call. `digest`: of those bits, 16 hex digits."""

    exact: bool
    digest: str


def prove(inputs: NDArray[Any], cache: Callable[[int], Any], run: Run, *, together: int = 1) -> SelfTest:
    """Compute the same rows in one call and in several, in caches of other sizes, and compare every bit.

    The several are side by side, a session for each of CHUNKINGS: so `run` may compute them together. Where
    that takes single rows of more sessions, these are compared up to so many `together`.
    """
    whole = _run(inputs, cache, run, [(len(inputs),)])[0]
    exact = (
        bool(np.isfinite(whole).all())
        and all(np.array_equal(out, whole) for out in _run(inputs, cache, run, CHUNKINGS))
        and _alike_in_company(inputs, cache, run, together)
    )
    return SelfTest(exact, hashlib.sha256(whole.tobytes()).hexdigest()[:16])


def some_rows(hidden: int, max_positions: int) -> Rows:
    """Random rows. One is a thousand times larger, as the first of a text often is."""
    rows = min(ROWS, max_positions)
    values = _random(rows).standard_normal((rows, hidden), np.float32)
    values[0] *= 1000
    return values


def some_tokens(vocab: int, max_positions: int) -> NDArray[np.int64]:
    """Random token ids."""
    rows = min(ROWS, max_positions)
    return _random(rows).integers(0, vocab, rows)


def _run(
    inputs: NDArray[Any], cache: Callable[[int], Any], run: Run, chunkings: Sequence[Sequence[int]]
) -> list[Rows]:
    """What came out for each chunking: the first chunks of all in one call, then the second, …"""
    caches = [cache(len(inputs) + 7 * number) for number in range(len(chunkings))]
    starts = [0] * len(chunkings)
    out: list[list[Rows]] = [[] for _ in chunkings]
    for chunks in zip_longest(*chunkings, fillvalue=0):
        parts = {
            number: (caches[number], inputs[start : start + size], start)
            for number, (start, size) in enumerate(zip(starts, chunks, strict=True))
            if size and start < len(inputs)
        }
        computed = run([*parts.values()]) if parts else []
        for number, rows in zip(parts, computed, strict=True):
            out[number].append(rows)
            starts[number] += chunks[number]
    return [np.concatenate(rows) for rows in out]


def _alike_in_company(inputs: NDArray[Any], cache: Callable[[int], Any], run: Run, most: int) -> bool:
    """Whether first rows of sessions have the same bits alone, and in batches of 2, 4, 8, … up to `most`."""
    caches = [cache(1) for _ in range(most if most > 1 else 0)]
    parts = [(own, inputs[[number % _DISTINCT % len(inputs)]], 0) for number, own in enumerate(caches)]
    alone = [run([part])[0] for part in parts[:_DISTINCT]]
    sizes = [*takewhile(lambda size: size < most, (2**power for power in count(1))), most]
    return all(
        np.array_equal(got, alone[number % _DISTINCT])
        for size in sizes
        for number, got in enumerate(run(parts[:size]) if parts else [])
    )


def _random(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))
