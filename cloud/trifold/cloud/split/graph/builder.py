"""Builder: one ONNX graph on a tape, with the operators that compute each row without regard to the others.

Values are (rows, 1, width) in fp32 unless a name says otherwise. Domain com.microsoft is ONNX Runtime's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from trifold.cloud.split.graph.matrix import Matrix, Source
from trifold.cloud.split.graph.quantize import BLOCK, Bits
from trifold.cloud.split.graph.weights import WeightsFile

MICROSOFT: Final = "com.microsoft"
OPSETS: Final = {"": 21, MICROSOFT: 1}
IR_VERSION: Final = 10
FLOAT: Final = ir.DataType.FLOAT
END: Final = 2**62
"""Of a Slice that takes all that there is."""


class Builder:
    """Adds inputs, operators and outputs to a graph; weights go to `weights` as they are read.

    `bits` is how weights are quantized, None for fp32.
    """

    def __init__(self, source: Source, weights: WeightsFile, bits: Bits | None, eps: float) -> None:
        self.source = source
        self.weights = weights
        self.bits = bits
        self.eps = eps
        self._tape = Tape()
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._constants: dict[tuple[object, ...], ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, shape: Sequence[int | str]) -> None:
        value.name, value.dtype, value.shape = name, FLOAT, ir.Shape(shape)
        self._outputs.append(value)

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """An operator of one output."""
        return self._tape.op(kind, inputs, attributes=attributes, domain=domain)

    def op_of(
        self, outputs: int, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """An operator of several outputs."""
        return self._tape.op_multi_out(
            kind, inputs, attributes=attributes, domain=domain, num_outputs=outputs
        )

    def ints(self, *values: int) -> ir.Value:
        """A constant vector of int64."""
        return self._constant(np.array(values, np.int64))

    def floats(self, *values: float) -> ir.Value:
        """A constant vector of fp32."""
        return self._constant(np.array(values, np.float32))

    def filled(self, value: float, *shape: int) -> ir.Value:
        """A constant fp32 of one value."""
        return self._constant(np.full(shape, value, np.float32))

    def scalar(self, value: float) -> ir.Value:
        """A constant fp32 of shape ()."""
        return self.filled(value)

    def tensor(self, values: NDArray[np.float32]) -> ir.Value:
        """A tensor of the model that is in memory already."""
        return self._tape.initializer(self.weights.array(values))

    def vector(self, name: str) -> ir.Value:
        """A norm or bias of the checkpoint."""
        return self.tensor(self.source.vector(name))

    def matrix(self, matrix: Matrix, *shape: int) -> ir.Value:
        """A weight in fp32, its rows folded to `shape`."""
        return self._tape.initializer(self.weights.matrix(matrix, shape))

    def quantized(self, matrix: Matrix, bits: Bits, *fold: int) -> tuple[ir.Value, ir.Value]:
        """Codes (*fold, bytes) and scales (*fold, blocks) of a weight whose rows are folded to `fold`."""
        codes, scales = self.weights.quantized(matrix, bits)
        blocks = -(-matrix.inputs // BLOCK)
        return (
            self._tape.initializer(_folded(codes, (*fold, blocks * BLOCK * bits // 8))),
            self._tape.initializer(_folded(scales, (*fold, blocks))),
        )

    def linear(
        self, x: ir.Value, matrix: Matrix, bias: ir.Value | None = None, bits: Bits | None = None
    ) -> ir.Value:
        """x · matrixᵀ + bias, quantized in `bits` or as the whole graph is."""
        if self.bits is None:
            return self.linear_fp32(x, matrix, bias)
        bits = bits or self.bits
        codes, scales = self.weights.quantized(matrix, bits)
        return self.op(
            "MatMulNBits",
            x,
            self._tape.initializer(codes),
            self._tape.initializer(scales),
            *([None, None, bias] if bias else []),
            domain=MICROSOFT,
            K=matrix.inputs,
            N=matrix.outputs,
            bits=bits,
            block_size=BLOCK,
            accuracy_level=4,
        )

    def linear_fp32(self, x: ir.Value, matrix: Matrix, bias: ir.Value | None = None) -> ir.Value:
        weight = self.matrix(matrix, matrix.outputs, matrix.inputs)
        product = self.op("FusedMatMul", x, weight, domain=MICROSOFT, transB=1)
        return self.op("Add", product, bias) if bias else product

    def norm(self, x: ir.Value, weight: ir.Value, eps: float | None = None) -> ir.Value:
        """RMSNorm over the last axis."""
        epsilon = self.eps if eps is None else eps
        return self.op("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=epsilon, stash_type=1)

    def add_norm(self, x: ir.Value, residual: ir.Value, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
        """RMSNorm of x + residual, and the sum itself: the new residual."""
        outputs = self.op_of(
            4, "SkipSimplifiedLayerNormalization", x, residual, weight, domain=MICROSOFT, epsilon=self.eps
        )
        return outputs[0], outputs[3]

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        return self.op("Reshape", x, self.ints(*shape))

    def split(self, x: ir.Value, *sizes: int) -> Sequence[ir.Value]:
        """Parts of the last axis."""
        return self.op_of(len(sizes), "Split", x, self.ints(*sizes), axis=-1)

    def first(self, x: ir.Value, count: int, axis: int) -> ir.Value:
        """The first `count` along an axis."""
        return self.op("Slice", x, self.ints(0), self.ints(count), self.ints(axis))

    def finish(self, name: str) -> bytes:
        """The graph as the bytes of an ONNX file; equal graphs give equal bytes."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports=OPSETS,
            name=name,
        )
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="trifold")
        return ir.serde.serialize_model(model).SerializeToString(deterministic=True)

    def _constant(self, values: NDArray[Any]) -> ir.Value:
        key = (values.dtype.str, values.shape, values.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self._tape.initializer(ir.tensor(values, name=name))
        return self._constants[key]


def _folded(tensor: ir.ExternalTensor, shape: tuple[int, ...]) -> ir.ExternalTensor:
    """The same bytes of the file seen in another shape."""
    return ir.ExternalTensor(
        tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=ir.Shape(shape), name=tensor.name
    )
