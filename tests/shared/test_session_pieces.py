"""Batches in pieces."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable

import pytest

from trifold.shared.errors import BadRows
from trifold.shared.session.pieces import PIECE_BYTES, joined, pieces


async def join(parts: Iterable[bytes], size: int) -> bytes | bytearray:
    rest = iter(parts)
    first = next(rest)

    async def more() -> bytes:
        return next(rest)

    return await joined(first, size, more)


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES])
async def test_what_was_cut_is_joined(size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    data = data[:size]
    assert await join(pieces(data), size) == data


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ([0], "a piece of 0 bytes where 3145728 are missing"),
        ([PIECE_BYTES - 1], "a piece of 1048575 bytes"),
        ([PIECE_BYTES, 2], "a piece of 2 bytes where 2097152 are missing"),
        ([PIECE_BYTES, PIECE_BYTES, PIECE_BYTES - 1], "a piece of 1048575 bytes where 1048576 are missing"),
        ([PIECE_BYTES, 2 * PIECE_BYTES + 1], "3145729 bytes or more where the batch takes 3145728"),
        ([3 * PIECE_BYTES + 1], "3145729 bytes or more"),
    ],
)
async def test_pieces_that_nobody_would_cut_are_refused(sizes: list[int], complaint: str) -> None:
    with pytest.raises(BadRows, match=complaint):
        await join(map(bytes, sizes), 3 * PIECE_BYTES)


async def test_joining_takes_the_memory_of_the_whole_and_nothing_before_it_comes() -> None:
    size = 32 * PIECE_BYTES
    tracemalloc.start()
    try:
        await join((bytes(PIECE_BYTES) for _ in range(32)), size)
        _, peak = tracemalloc.get_traced_memory()
        assert peak < 1.3 * size
        tracemalloc.reset_peak()
        with pytest.raises(BadRows):
            await join((bytes(PIECE_BYTES), b"2"), size)
        _, peak = tracemalloc.get_traced_memory()
        assert peak < 4 * PIECE_BYTES
    finally:
        tracemalloc.stop()
