"""StandardBuilder: a graph of the standard operators that TensorRT's parser knows from 10.15 on.

Opset 24 of ai.onnx and nothing else; Swish, which belongs to it, TensorRT learnt later. Values are in fp32
unless a name says "low": those are in what the core computes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import onnx_ir as ir

from trifold.cloud.core.engines.tensorrt.precision import COMPUTED, NUMPY, Precision, fp8_scale
from trifold.cloud.core.engines.tensorrt.typed_weights import TypedWeights
from trifold.cloud.split.graph.builder import FLOAT, Builder
from trifold.cloud.split.graph.matrix import Matrix, Source

OPSET: Final = 24
IR_VERSION: Final = 12


class StandardBuilder(Builder):
    """A Builder whose `project` multiplies in `precision`."""

    def __init__(self, source: Source, weights: TypedWeights, precision: Precision, eps: float) -> None:
        super().__init__(source, weights, None, eps)
        self.precision = precision
        self.computed = COMPUTED[precision]
        self._typed = weights

    def project(
        self, low: ir.Value, matrix: Matrix, bias: ir.Value | None = None, bound: float | None = None
    ) -> ir.Value:
        """low (rows, inputs) · matrixᵀ + bias (fp32), low.

        In fp8 where no value of `low` can be further from 0 than `bound`: its scale needs no calibration, and
        one row's does not depend on the others.
        """
        if self.precision == "fp8" and bound is not None:
            low, weight = self._through_fp8(low, bound), self._fp8(matrix)
        else:
            weight = self._tape.initializer(self._typed.typed(matrix, self.computed))
        return self.op("Gemm", low, weight, *([self.low(bias)] if bias else []), transB=1)

    def linear_fp32(self, x: ir.Value, matrix: Matrix, bias: ir.Value | None = None) -> ir.Value:
        """x (rows, 1, inputs) · matrixᵀ + bias, whatever the precision: for the router."""
        weight = self.matrix(matrix, matrix.outputs, matrix.inputs)
        flat = self.reshape(x, -1, matrix.inputs)
        product = self.op("Gemm", flat, weight, *([bias] if bias else []), transB=1)
        return self.reshape(product, -1, 1, matrix.outputs)

    def norm(self, x: ir.Value, weight: ir.Value, eps: float | None = None) -> ir.Value:
        """RMSNorm over the last axis."""
        epsilon = self.eps if eps is None else eps
        return self.op("RMSNormalization", x, weight, axis=-1, epsilon=epsilon)

    def bound(self, norm: str) -> float:
        """The furthest that a value can be from 0 behind the RMSNorm of that name."""
        gain = self.source.vector(norm)
        return float(np.abs(gain).max() * np.sqrt(len(gain)))

    def low(self, x: ir.Value) -> ir.Value:
        return x if self.computed == FLOAT else self.op("Cast", x, to=self.computed)

    def full(self, low: ir.Value) -> ir.Value:
        return low if self.computed == FLOAT else self.op("Cast", low, to=FLOAT)

    def swish(self, x: ir.Value) -> ir.Value:
        return self.op("Mul", x, self.op("Sigmoid", x))

    def output(
        self, value: ir.Value, name: str, shape: Sequence[int | str], dtype: ir.DataType = FLOAT
    ) -> None:
        super().output(value, name, shape)
        value.dtype = dtype

    def finish(self, name: str) -> bytes:
        """The graph as the bytes of an ONNX file; equal graphs give equal bytes."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports={"": OPSET},
            name=name,
        )
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="trifold")
        return ir.serde.serialize_model(model).SerializeToString(deterministic=True)

    def _through_fp8(self, low: ir.Value, bound: float) -> ir.Value:
        scale, zero = self._scale(fp8_scale(bound)), self._zero()
        return self.op("DequantizeLinear", self.op("QuantizeLinear", low, scale, zero), scale, zero)

    def _fp8(self, matrix: Matrix) -> ir.Value:
        weight, scale = self._typed.fp8(matrix)
        return self.op("DequantizeLinear", self._tape.initializer(weight), self._scale(scale), self._zero())

    def _scale(self, value: float) -> ir.Value:
        return self._constant(np.array(value, NUMPY[self.computed]))

    def _zero(self) -> ir.Value:
        return self._constant(np.array(0, NUMPY[ir.DataType.FLOAT8E4M3FN]))
