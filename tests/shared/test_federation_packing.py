from __future__ import annotations

import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trifold.shared.errors import InvalidRequest
from trifold.shared.federation.packing import GROUP, KINDS, Arrays, Kind, pack, shapes_of, size, unpack

kinds = st.sampled_from(KINDS)
arrays = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 9), st.integers(1, 40)),
    elements=st.floats(-(2.0**40), 2.0**40, width=32),
)
updates = st.dictionaries(st.sampled_from(["a.lora_A", "a.lora_B", "b.lora_A"]), arrays, min_size=1)


def normal(scale: float = 1.0) -> Arrays:
    rng = np.random.default_rng(0)
    shapes = {"m.q_proj.lora_A": (8, 200), "m.q_proj.lora_B": (300, 8)}
    return {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


@given(updates, kinds)
def test_a_packed_update_has_the_size_that_was_announced_and_the_shapes_it_had(
    update: Arrays, kind: Kind
) -> None:
    data = pack(update, kind)
    assert len(data) == size(shapes_of(update), kind)
    arrived = unpack(data, shapes_of(update), kind)
    assert shapes_of(arrived) == shapes_of(update)
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in arrived.values())


@given(updates)
def test_fp32_changes_no_bit(update: Arrays) -> None:
    arrived = unpack(pack(update, "fp32"), shapes_of(update), "fp32")
    assert all(np.array_equal(arrived[name], update[name]) for name in update)


@given(updates)
def test_int8_misses_no_value_by_more_than_a_step_of_its_group(update: Arrays) -> None:
    arrived = unpack(pack(update, "int8"), shapes_of(update), "int8")
    least = max(float(np.abs(array).max()) for array in update.values()) * 2.0**-24
    for name, array in update.items():
        values, found = array.reshape(-1), arrived[name].reshape(-1)
        for start in range(0, values.size, GROUP):
            group = values[start : start + GROUP]
            step = max(float(np.abs(group).max()) / 127, least)
            assert np.abs(found[start : start + GROUP] - group).max() <= 1.1 * step


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
def test_int8_is_as_exact_for_small_updates_as_for_large_ones(scale: float) -> None:
    update = normal(scale)
    arrived = unpack(pack(update, "int8"), shapes_of(update), "int8")
    for name, array in update.items():
        assert np.linalg.norm(arrived[name] / scale - array / scale) < 0.01 * np.linalg.norm(array / scale)


def test_int8_takes_at_most_27_percent_of_fp32_with_scales_and_header() -> None:
    shapes = shapes_of(normal())
    assert size(shapes, "int8") <= 0.27 * size(shapes, "fp32")
    assert size(shapes, "int8-2:4") <= 0.18 * size(shapes, "fp32")


def test_the_two_largest_of_four_values_are_kept() -> None:
    update = {"a": np.array([[1, -3, 2, 0.5], [0, 0, 0, 0], [4, 4, 4, 4]], np.float32)}
    arrived = unpack(pack(update, "int8-2:4"), shapes_of(update), "int8-2:4")["a"]
    assert np.flatnonzero(arrived[0]).tolist() == [1, 2]
    assert np.allclose(arrived[0], [0, -3, 2, 0], atol=0.05)
    assert not arrived[1].any()
    assert np.flatnonzero(arrived[2]).tolist() == [0, 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(normal()))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_site_does_not_pack_what_is_not_finite(bad: float, name: str, kind: Kind) -> None:
    update = normal()
    update[name][3, 4] = bad
    with pytest.raises(InvalidRequest, match="not finite"):
        pack(update, kind)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_update_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        unpack(data, shapes_of(normal()), "int8")


@given(st.integers(0, 35), st.integers(0, 255), kinds)
def test_a_header_with_another_byte_is_refused_or_leaves_the_shapes(
    place: int, byte: int, kind: Kind
) -> None:
    update = normal()
    data = bytearray(pack(update, kind))
    data[place] = byte
    with suppress(InvalidRequest):
        assert shapes_of(unpack(bytes(data), shapes_of(update), kind)) == shapes_of(update)


def test_a_claim_of_a_gigabyte_is_refused_before_anything_is_allocated() -> None:
    data = bytearray(pack(normal(), "int8"))
    struct.pack_into("<Q", data, 8, 10**9)
    with pytest.raises(InvalidRequest, match="claims 1000000000 values, the adapter has 4000"):
        unpack(bytes(data), shapes_of(normal()), "int8")


def test_another_shape_name_dtype_or_length_is_refused_saying_which() -> None:
    update = normal()
    data, shapes = pack(update, "int8"), shapes_of(update)
    turned = {name: shape[::-1] for name, shape in shapes.items()}
    renamed = {name.upper(): shape for name, shape in shapes.items()}
    for other in (turned, renamed):
        with pytest.raises(InvalidRequest, match="names or shapes"):
            unpack(data, other, "int8")
    with pytest.raises(InvalidRequest, match="dtype is int8, agreed was fp32"):
        unpack(data, shapes, "fp32")
    for cut in (data[:-1], data + b"\0"):
        with pytest.raises(InvalidRequest, match=f"{len(cut)} bytes instead of {len(data)}"):
            unpack(cut, shapes, "int8")
