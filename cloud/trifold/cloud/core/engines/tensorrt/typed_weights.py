"""TypedWeights: a weights.bin whose matrices are held in what they are computed in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from trifold.cloud.core.engines.tensorrt.precision import NUMPY, fp8_scale
from trifold.cloud.split.graph.matrix import Matrix
from trifold.cloud.split.graph.weights import WeightsFile


class TypedWeights(WeightsFile):
    """Beside what a WeightsFile takes: matrices in 16 bits, and in fp8 under one scale."""

    def typed(self, matrix: Matrix, dtype: ir.DataType) -> ir.ExternalTensor:
        """A matrix (outputs, inputs) in `dtype`."""
        return self._add(dtype, (matrix.outputs, matrix.inputs), _cast(matrix, dtype, 1.0))

    def fp8(self, matrix: Matrix) -> tuple[ir.ExternalTensor, float]:
        """A matrix in E4M3, and the scale to multiply it by. It is read twice, first for the scale."""
        largest = max(float(np.abs(piece).max()) for piece in matrix.pieces())
        scale = fp8_scale(largest)
        dtype = ir.DataType.FLOAT8E4M3FN
        return self._add(dtype, (matrix.outputs, matrix.inputs), _cast(matrix, dtype, scale)), scale


def _cast(matrix: Matrix, dtype: ir.DataType, scale: float) -> Iterator[NDArray[Any]]:
    """As bytes, because NumPy shows no buffer of dtypes that it does not know."""
    for piece in matrix.pieces():
        yield (piece / np.float32(scale)).astype(NUMPY[dtype]).view(np.uint8)
