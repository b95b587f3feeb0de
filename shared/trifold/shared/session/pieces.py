"""Batches that do not fit one message: cut into pieces, and put together again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Final

from trifold.shared.errors import BadRows

PIECE_BYTES: Final = 1024 * 1024
"""A piece is being sent while the next is written; a message may be larger, a stream's window is not."""


def pieces(data: bytes) -> Iterator[bytes]:
    """All of the data, in order; one piece at least."""
    yield data[:PIECE_BYTES]
    for start in range(PIECE_BYTES, len(data), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]


async def joined(first: bytes, size: int, more: Callable[[], Awaitable[bytes]]) -> bytes | bytearray:
    """The `size` bytes that begin with `first`, waiting for `more` as long as there are too few.

    Never holds more than a message beyond what has come. Raises BadRows for too many bytes, and for a piece
    that is short of PIECE_BYTES without being the last: many small ones would take many times their bytes.
    """
    if len(first) == size:
        return first
    whole, piece = bytearray(), first
    while True:
        missing = size - len(whole)
        if len(piece) > missing:
            raise BadRows(f"{len(whole) + len(piece)} bytes or more where the batch takes {size}")
        if len(piece) < min(missing, PIECE_BYTES):
            raise BadRows(f"a piece of {len(piece)} bytes where {missing} are missing and {PIECE_BYTES} fit")
        whole += piece
        if len(whole) == size:
            return whole
        piece = await more()
