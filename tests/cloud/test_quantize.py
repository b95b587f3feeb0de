"""Weights in blocks of 32."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from trifold.cloud.split.graph.quantize import BLOCK, Bits, quantize

Float = NDArray[np.float32]
TINY = 1e-35
"""Below this, blocks count as zeros."""


def restored(rows: Float, bits: Bits) -> tuple[Float, Float]:
    """The values that the codes stand for, and the scale of each."""
    codes, scales = quantize(rows, bits)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], BLOCK)
    values = (codes.astype(np.float32) - 2 ** (bits - 1)) * scales[:, :, None]
    width = rows.shape[1]
    return values.reshape(len(rows), -1)[:, :width], np.repeat(np.abs(scales), BLOCK, axis=1)[:, :width]


matrices = st.integers(1, 100).flatmap(
    lambda width: arrays(np.float32, (3, width), elements=st.floats(-1e3, 1e3, width=32))
)


@given(matrices)
def test_int8_is_off_by_half_a_step_at_most(rows: Float) -> None:
    values, steps = restored(rows, 8)
    assert (np.abs(values - rows) <= steps * 0.501 + TINY).all()


@given(matrices)
def test_int4_is_off_by_a_step_at_most_and_keeps_the_largest_value(rows: Float) -> None:
    values, steps = restored(rows, 4)
    assert (np.abs(values - rows) <= steps * 1.001 + TINY).all()
    block = rows[:, :BLOCK]
    # Where both signs are as large, the positive value is kept and the negative one is a step off.
    largest = np.where(-block.min(axis=1) > block.max(axis=1), block.argmin(axis=1), block.argmax(axis=1))
    each = np.arange(len(rows))
    assert np.allclose(values[each, largest], rows[each, largest], rtol=1e-6, atol=TINY)


def test_zeros_stay_zeros() -> None:
    rows = np.zeros((2, 40), np.float32)
    for bits in (4, 8):
        assert (restored(rows, bits)[0] == 0).all()


def test_a_last_block_is_filled_with_zeros() -> None:
    codes, scales = quantize(np.ones((1, 40), np.float32), 8)
    assert codes.shape == (1, 2, 32)
    assert scales.shape == (1, 2)
    assert (codes[0, 1, 8:] == 128).all()
