"""Precision: what the core computes in. The residual stream, norms, router and rotation are fp32 in all."""

from __future__ import annotations

import math
from typing import Final, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

Precision = Literal["fp32", "fp16", "bf16", "fp8"]

COMPUTED: Final[dict[Precision, ir.DataType]] = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "fp8": ir.DataType.BFLOAT16,
}
"""What products give, and what keys and values are kept in."""

NEEDS: Final[dict[Precision, tuple[int, int]]] = {
    "fp32": (7, 5),
    "fp16": (7, 5),
    "bf16": (8, 0),
    "fp8": (8, 9),
}
"""The compute capability from which a GPU has it; TensorRT 10 itself starts at 7.5."""

NUMPY: Final = {
    ir.DataType.FLOAT: np.dtype(np.float32),
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    ir.DataType.FLOAT8E4M3FN: np.dtype(ml_dtypes.float8_e4m3fn),
}

_LARGEST_FP8: Final = 448.0
"""Of E4M3."""


def fp8_scale(largest: float) -> float:
    """What to divide values up to `largest` by: a power of two, which loses no digit and is exact in bf16."""
    return 2.0 ** math.ceil(math.log2(largest / _LARGEST_FP8)) if largest else 1.0
