"""WeightsFile: the weights.bin of a shard, written tensor by tensor and hashed on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from trifold.cloud.split.graph.matrix import Matrix
from trifold.cloud.split.graph.quantize import BLOCK, Bits, quantize
from trifold.shared.bundle.manifest import FileEntry

ALIGNMENT: Final = 64
WEIGHTS: Final = "weights.bin"


class WeightsFile:
    """A new file at `path`. What writes a tensor to it returns the reference that an ONNX graph holds."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self._size = 0
        self._tensors = 0

    def close(self) -> None:
        self._file.close()

    def entry(self) -> FileEntry:
        """Size and hash of what has been written."""
        return FileEntry(size=self._size, sha256=self._hash.hexdigest())

    def array(self, values: NDArray[np.float32]) -> ir.ExternalTensor:
        """A tensor that is in memory already: a norm, a bias."""
        return self._add(ir.DataType.FLOAT, values.shape, [values])

    def matrix(self, matrix: Matrix, shape: tuple[int, ...] | None = None) -> ir.ExternalTensor:
        """A matrix in fp32; `shape` may fold its rows."""
        return self._add(ir.DataType.FLOAT, shape or (matrix.outputs, matrix.inputs), matrix.pieces())

    def quantized(self, matrix: Matrix, bits: Bits) -> tuple[ir.ExternalTensor, ir.ExternalTensor]:
        """Bytes (outputs, blocks, 32 · bits / 8) and scales (outputs, blocks) of a matrix."""
        scales: list[NDArray[np.float32]] = []

        def codes() -> Iterable[NDArray[Any]]:
            for piece in matrix.pieces():
                quantized, scale = quantize(piece, bits)
                scales.append(scale)
                yield quantized

        blocks = -(-matrix.inputs // BLOCK)
        shape = (matrix.outputs, blocks, BLOCK * bits // 8)
        data = self._add(ir.DataType.UINT8, shape, codes())
        return data, self._add(ir.DataType.FLOAT, (matrix.outputs, blocks), scales)

    def _add(
        self, dtype: ir.DataType, shape: tuple[int, ...], pieces: Iterable[NDArray[Any]]
    ) -> ir.ExternalTensor:
        self._write(bytes(-self._size % ALIGNMENT))
        start = self._size
        for piece in pieces:
            self._write(np.ascontiguousarray(piece).data.cast("B"))
        self._tensors += 1
        return ir.ExternalTensor(
            WEIGHTS, start, self._size - start, dtype, shape=ir.Shape(shape), name=f"weight_{self._tensors}"
        )

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)
