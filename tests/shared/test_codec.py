from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.bundle.manifest import CodecName
from trifold.shared.errors import BadRows
from trifold.shared.runtime.codec import ANCHORS, LARGEST, RowCodec, Rows

CODECS: tuple[CodecName, ...] = ("none", "bf16", "int8")
HIDDEN = 16

codec_names = st.sampled_from(CODECS)
positions = st.integers(0, 2 * ANCHORS)
matrices = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 12), st.just(HIDDEN)),
    elements=st.floats(-float(LARGEST), float(LARGEST), width=32),
)


def normal(rows: int, hidden: int = HIDDEN) -> Rows:
    return np.random.default_rng(rows).standard_normal((rows, hidden), np.float32)


@given(codec_names, matrices, positions, st.data())
def test_rows_come_out_the_same_however_they_are_cut_into_messages(
    name: CodecName, rows: Rows, base_pos: int, data: st.DataObject
) -> None:
    codec = RowCodec(name, HIDDEN)
    whole = codec.encode(rows, base_pos)
    cut = data.draw(st.integers(0, len(rows)))
    first, second = codec.encode(rows[:cut], base_pos), codec.encode(rows[cut:], base_pos + cut)
    assert first + second == whole
    decoded = codec.decode(whole, len(rows), base_pos)
    parts = codec.decode(first, cut, base_pos), codec.decode(second, len(rows) - cut, base_pos + cut)
    assert np.array_equal(np.concatenate(parts), decoded)


@given(codec_names, matrices, positions)
def test_every_message_has_the_size_that_was_announced_and_finite_rows(
    name: CodecName, rows: Rows, base_pos: int
) -> None:
    codec = RowCodec(name, HIDDEN)
    data = codec.encode(rows, base_pos)
    assert len(data) == codec.size(len(rows), base_pos)
    decoded = codec.decode(data, len(rows), base_pos)
    assert decoded.dtype == np.float32
    assert decoded.shape == rows.shape
    assert np.isfinite(decoded).all()


@given(matrices, positions)
def test_int8_misses_no_value_by_more_than_half_a_scale(rows: Rows, base_pos: int) -> None:
    codec = RowCodec("int8", HIDDEN)
    decoded = codec.decode(codec.encode(rows, base_pos), len(rows), base_pos)[max(0, ANCHORS - base_pos) :]
    rows = rows[max(0, ANCHORS - base_pos) :].astype(np.float64)
    scales = np.abs(rows).max(axis=1, initial=0, keepdims=True) / 127
    scales = np.maximum(scales, np.finfo(np.float32).tiny)
    assert (np.abs(decoded - rows) <= scales * (0.5 + 1e-4)).all()


def test_int8_rounds_half_to_even() -> None:
    row = np.zeros((1, HIDDEN), np.float32)
    row[0, :7] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]
    data = RowCodec("int8", HIDDEN).encode(row, ANCHORS)
    assert np.frombuffer(data[:4], "<f4") == 1
    assert np.frombuffer(data[4:], np.int8)[:7].tolist() == [127, 0, 2, 2, 0, -2, -2]


def test_the_first_positions_are_bf16_and_the_others_int8() -> None:
    codec = RowCodec("int8", HIDDEN)
    assert [codec.size(1, position) for position in range(6)] == [2 * HIDDEN] * 4 + [4 + HIDDEN] * 2
    rows = normal(3)
    assert codec.encode(rows, 0) == RowCodec("bf16", HIDDEN).encode(rows, 0)


def test_a_row_of_zeros_stays_zeros() -> None:
    zeros = np.zeros((6, HIDDEN), np.float32)
    for name in CODECS:
        codec = RowCodec(name, HIDDEN)
        assert not codec.decode(codec.encode(zeros, 2), 6, 2).any()


def test_codec_none_changes_no_bit() -> None:
    rows = normal(5)
    codec = RowCodec("none", HIDDEN)
    assert np.array_equal(codec.decode(codec.encode(rows, 0), 5, 0), rows)


def test_rows_that_are_a_slice_of_a_larger_array_are_written_right() -> None:
    wide = normal(8, 2 * HIDDEN)
    for name in CODECS:
        codec = RowCodec(name, HIDDEN)
        assert codec.encode(wide[::2, HIDDEN:], 0) == codec.encode(wide[::2, HIDDEN:].copy(), 0)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("base_pos", [0, 2, 9])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_values_that_are_not_finite_are_neither_written_nor_read(
    name: CodecName, base_pos: int, bad: float
) -> None:
    codec = RowCodec(name, HIDDEN)
    rows = normal(5)
    rows[4, 3] = bad
    with pytest.raises(BadRows, match="not finite"):
        codec.encode(rows, base_pos)
    data = bytearray(codec.encode(normal(5), base_pos))
    last = codec.size(4, base_pos)
    data[last : last + 4] = b"\x80\xff\x80\xff" if name == "bf16" else np.float32(bad).tobytes()
    with pytest.raises(BadRows, match="not finite"):
        codec.decode(data, 5, base_pos)


def test_a_negative_scale_is_refused() -> None:
    codec = RowCodec("int8", HIDDEN)
    data = np.float32(-1).tobytes() + bytes(HIDDEN)
    with pytest.raises(BadRows, match="negative"):
        codec.decode(data, 1, ANCHORS)


@pytest.mark.parametrize("name", CODECS)
def test_a_message_of_another_length_is_refused_naming_both(name: CodecName) -> None:
    codec = RowCodec(name, HIDDEN)
    data = codec.encode(normal(5), 2)
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(BadRows, match=f"{len(data)} bytes in codec {name}, not {len(wrong)}"):
            codec.decode(wrong, 5, 2)


@pytest.mark.parametrize(
    "rows", [np.zeros((2, HIDDEN + 1), np.float32), np.zeros(HIDDEN, np.float32), np.zeros((2, HIDDEN))]
)
def test_rows_of_another_shape_or_dtype_are_refused(rows: Rows) -> None:
    with pytest.raises(BadRows, match=r"float32 \(n, 16\)"):
        RowCodec("int8", HIDDEN).encode(rows, 0)


def test_the_wire_knows_every_codec() -> None:
    assert {RowCodec(name, HIDDEN).wire for name in CODECS} | {pb.CODEC_UNSPECIFIED} == {*pb.Codec.values()}
