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


async def joined(first: bytes, size: int, more: Callable[[], Awaitable[bytes]]) -> bytes:
    """The `size` bytes that begin with `first`, waiting for `more` as long as there are too few.

    Never holds more than a message beyond `size`. Raises BadRows for an empty piece or too many bytes.
    """
    whole = [first]
    missing = size - len(first)
    while missing > 0:
        piece = await more()
        if not piece:
            raise BadRows(f"an empty piece where {missing} bytes are missing")
        whole.append(piece)
        missing -= len(piece)
    if missing < 0:
        raise BadRows(f"{size - missing} bytes or more where the batch takes {size}")
    return first if len(whole) == 1 else b"".join(whole)
