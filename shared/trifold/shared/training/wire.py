"""Batches of rows in bytes: sequences one after the other, each beginning at position 0. No torch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from trifold.shared.errors import BadRows
from trifold.shared.runtime.codec import RowCodec

Batch = NDArray[np.float32]
"""Rows or their gradients: (sequences, length, hidden)."""


def size(sequences: int, length: int, codec: RowCodec) -> int:
    """Bytes of a batch."""
    return sequences * codec.size(length, 0)


def encode(batch: Batch, codec: RowCodec) -> bytes:
    """The bytes of a batch. Raises BadRows for another width or for values not finite."""
    return b"".join(codec.encode(rows, 0) for rows in batch)


def decode(data: bytes | bytearray | memoryview, sequences: int, length: int, codec: RowCodec) -> Batch:
    """The batch (sequences, length, hidden). Raises BadRows for a wrong size or for values not finite."""
    needed = size(sequences, length, codec)
    data = memoryview(data)
    if data.nbytes != needed:
        what = f"{sequences} sequences of {length} rows"
        raise BadRows(f"{what} take {needed} bytes in codec {codec.name}, not {data.nbytes}")
    bounds = pairwise(range(0, needed + 1, codec.size(length, 0)))
    return np.stack([codec.decode(data[start:stop], length, 0) for start, stop in bounds])


def through(batch: Batch, codec: RowCodec) -> Batch:
    """What arrives of a batch behind a cut."""
    sequences, length, _ = batch.shape
    return decode(encode(batch, codec), sequences, length, codec)
