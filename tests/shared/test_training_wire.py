"""Batches of rows on the wire of training."""

from __future__ import annotations

import numpy as np
import pytest

from trifold.shared.bundle.manifest import CodecName
from trifold.shared.errors import BadRows
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.training import wire


def batch(sequences: int = 3, length: int = 7, hidden: int = 16) -> wire.Batch:
    return np.random.default_rng(1).normal(size=(sequences, length, hidden)).astype(np.float32)


@pytest.mark.parametrize("name", ["none", "bf16", "int8"])
def test_each_sequence_is_written_as_the_serving_codec_writes_it_from_position_0(name: CodecName) -> None:
    rows, codec = batch(), RowCodec(name, 16)
    sequences = [codec.decode(codec.encode(sequence, 0), 7, 0) for sequence in rows]
    assert np.array_equal(wire.through(rows, codec), np.stack(sequences))
    assert len(wire.encode(rows, codec)) == wire.size(3, 7, codec) == 3 * codec.size(7, 0)


def test_a_batch_of_another_size_is_refused() -> None:
    codec = RowCodec("int8", 16)
    data = wire.encode(batch(), codec)
    with pytest.raises(BadRows, match="4 sequences of 7 rows take"):
        wire.decode(data, 4, 7, codec)


def test_rows_that_are_not_finite_are_refused() -> None:
    rows = batch()
    rows[2, 6, 15] = np.nan
    with pytest.raises(BadRows, match="not finite"):
        wire.encode(rows, RowCodec("int8", 16))
