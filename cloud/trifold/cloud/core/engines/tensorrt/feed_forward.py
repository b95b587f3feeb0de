"""SwiGLU, and experts as one wide SwiGLU in which a row's router weight is 0 for whom it did not choose.

Until 11.0 TensorRT's parser knows no experts, and an engine's graph may not depend on what a row chose. So
every row goes through every expert: an engine reads all experts once for a batch, and multiplies
experts / top_k times as much as it had to. The other way, to gather the weights that each row chose, moves
them three times (read, write, read) for each row: it is faster below experts / (3 · top_k) rows, which for
Qwen3-30B-A3B is 5, and ruinous for a prompt: for 512 rows it would copy all experts of a layer 32 times.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from trifold.cloud.core.engines.tensorrt.operators import StandardBuilder
from trifold.cloud.split.graph.matrix import PIECE, Float, Matrix, Source, stack, whole
from trifold.cloud.split.graph.router import route
from trifold.shared.model.names import DenseNames, MoeNames
from trifold.shared.model.spec import MoeFfn


def swiglu(builder: StandardBuilder, low: ir.Value, names: DenseNames, bound: float) -> ir.Value:
    """down(silu(gate(x)) · up(x)) of rows low (rows, hidden) within `bound`, before the residual, low."""
    source = builder.source
    bias = None
    if names.gate_bias and names.up_bias:
        both = [source.vector(name) for name in (names.gate_bias, names.up_bias)]
        bias = builder.tensor(np.concatenate(both))
    inner = _inner(builder, low, [names], bias, bound)
    down_bias = builder.vector(names.down_bias) if names.down_bias else None
    return builder.project(builder.low(inner), whole(source, names.down), down_bias)


def mixture(
    builder: StandardBuilder, x: ir.Value, low: ir.Value, spec: MoeFfn, names: MoeNames, bound: float
) -> ir.Value:
    """Routed and shared experts of rows x (rows, hidden), which `low` are too, before the residual, low."""
    source, width = builder.source, spec.experts * spec.width
    row = builder.op("Unsqueeze", x, builder.ints(1))
    experts, weights = route(builder, row, spec, names)
    hot = builder.op("OneHot", experts, builder.ints(spec.experts), builder.floats(0, 1), axis=-1)
    of_all = builder.op("MatMul", weights, builder.reshape(hot, -1, spec.top_k, spec.experts))
    each = [names.expert(index) for index in range(spec.experts)]
    inner = builder.reshape(_inner(builder, low, each, None, bound), -1, spec.experts, spec.width)
    inner = builder.op("Mul", inner, builder.reshape(of_all, -1, spec.experts, 1))
    down = side_by_side(source, [expert.down for expert in each])
    routed = builder.project(builder.low(builder.reshape(inner, -1, width)), down)
    if names.shared is None:
        return routed
    return builder.op("Add", routed, swiglu(builder, low, names.shared, bound))


def side_by_side(source: Source, names: list[str]) -> Matrix:
    """Weights of equal outputs as one, the inputs of the first first."""
    outputs, inputs = source.checkpoint.shape(names[0])
    step = max(1, PIECE // (len(names) * inputs))

    def pieces() -> Iterator[Float]:
        for start in range(0, outputs, step):
            stop = min(start + step, outputs)
            yield np.concatenate([source.rows(name, start, stop) for name in names], axis=1)

    return Matrix(outputs, len(names) * inputs, pieces)


def _inner(
    builder: StandardBuilder, low: ir.Value, parts: list[DenseNames], bias: ir.Value | None, bound: float
) -> ir.Value:
    """silu(gate(x)) · up(x) of all parts, side by side."""
    gates = [whole(builder.source, part.gate) for part in parts]
    ups = [whole(builder.source, part.up) for part in parts]
    width = sum(gate.outputs for gate in gates)
    both = builder.full(builder.project(low, stack([*gates, *ups]), bias, bound))
    gated, raised = builder.split(both, width, width)
    return builder.op("Mul", builder.swish(gated), raised)
