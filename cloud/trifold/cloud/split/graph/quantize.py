"""Quantization of weights in blocks of 32, in the format of MatMulNBits, QMoE and GatherBlockQuantized.

With blocks of 32 and int8 activations (accuracy_level 4) the kernels give a row the same bits whatever the
other rows are; with larger blocks they do not.
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

Bits = Literal[4, 8]

BLOCK: Final = 32


def quantize(rows: NDArray[np.float32], bits: Bits) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Bytes (n, blocks, 32 · bits / 8) and scales (n, blocks) of rows (n, k); zeros fill the last block.

    A value is (q - 2**(bits-1)) · scale. int8 uses -127 … 127. int4 gives the value of largest magnitude the
    code -8, as the Q4_0 of llama.cpp does, because that wastes no code. Low nibble first.
    """
    count, size = rows.shape
    blocks = -(-size // BLOCK)
    padded = rows
    if blocks * BLOCK != size:
        padded = np.zeros((count, blocks * BLOCK), np.float32)
        padded[:, :size] = rows
    values = padded.reshape(count, blocks, BLOCK)
    low, high = values.min(axis=2), values.max(axis=2)
    if bits == 8:
        scales = np.maximum(-low, high) / np.float32(127)
    else:
        scales = np.where(-low > high, low, high) / np.float32(-8)
    # What the smallest normal number cannot scale counts as zero.
    scales[np.abs(scales) < np.finfo(np.float32).tiny] = 0
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    codes = values * inverse[:, :, None]
    np.rint(codes, out=codes)
    np.add(codes, np.float32(2 ** (bits - 1)), out=codes)
    if bits == 8:
        return codes.astype(np.uint8), scales
    nibbles = np.minimum(codes, 15, out=codes).astype(np.uint8)
    return nibbles[:, :, 0::2] | nibbles[:, :, 1::2] << 4, scales
