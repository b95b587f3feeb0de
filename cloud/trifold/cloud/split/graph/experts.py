"""Routed experts as QMoE, or MoE in fp32, in a form that gives a row the same bits whatever the others are.

Both operators add up the experts of a row in an order that depends on how many rows each expert got. So every
row is written top_k times, each copy goes to one expert (k=1), and the results are combined outside.
"""

from __future__ import annotations

from typing import Any, Final

import onnx_ir as ir

from trifold.cloud.split.graph.builder import MICROSOFT, Builder
from trifold.cloud.split.graph.dense import swiglu
from trifold.cloud.split.graph.matrix import experts_in, experts_out
from trifold.cloud.split.graph.quantize import BLOCK, Bits
from trifold.cloud.split.graph.router import route
from trifold.shared.model.names import MoeNames
from trifold.shared.model.spec import MoeFfn

_SWIGLU: Final[dict[str, Any]] = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "k": 1,
    "normalize_routing_weights": 0,
}

_UNCHOSEN: Final = -1e4
"""A router logit whose softmax beside 0 is exactly 0 in fp32."""


def mixture(builder: Builder, x: ir.Value, hidden: int, spec: MoeFfn, names: MoeNames) -> ir.Value:
    """Routed and shared experts of rows x, before the residual."""
    experts, weights = route(builder, x, spec, names)
    if builder.bits is None:
        outputs = _fp32(builder, x, hidden, experts, spec, names)
    else:
        outputs = _quantized(builder, builder.bits, x, hidden, experts, spec, names)
    routed = builder.op("MatMul", weights, outputs)
    return builder.op("Add", routed, swiglu(builder, x, names.shared)) if names.shared else routed


def _quantized(
    builder: Builder,
    bits: Bits,
    x: ir.Value,
    hidden: int,
    experts: ir.Value,
    spec: MoeFfn,
    names: MoeNames,
) -> ir.Value:
    """(rows, top_k, hidden). QMoE takes whole blocks only: rows and experts get blanks up to them."""
    padded, width = (-(-size // BLOCK) * BLOCK for size in (hidden, spec.width))
    if padded != hidden:
        x = builder.op("Pad", x, builder.ints(0, 0, 0, 0, 0, padded - hidden))
    into = experts_in(builder.source, names, spec.experts, width, padded)
    out_of = experts_out(builder.source, names, spec.experts, width, padded)
    codes_in, scales_in = builder.quantized(into, bits, spec.experts, 2 * width)
    codes_out, scales_out = builder.quantized(out_of, bits, spec.experts, padded)
    outputs = builder.op(
        "QMoE",
        _repeated(builder, x, spec.top_k),
        _hot(builder, experts, spec, 0.0, 1.0),
        codes_in,
        scales_in,
        None,
        codes_out,
        scales_out,
        domain=MICROSOFT,
        expert_weight_bits=bits,
        block_size=BLOCK,
        quant_type="int",
        accuracy_level=4,
        weights_prepacked=0,
        **_SWIGLU,
    )
    return outputs if padded == hidden else builder.first(outputs, hidden, axis=2)


def _fp32(
    builder: Builder, x: ir.Value, hidden: int, experts: ir.Value, spec: MoeFfn, names: MoeNames
) -> ir.Value:
    """(rows, top_k, hidden). An expert with one row computes other bits than with more: all rows go twice."""
    into = experts_in(builder.source, names, spec.experts, spec.width, hidden)
    out_of = experts_out(builder.source, names, spec.experts, spec.width, hidden)
    rows = _repeated(builder, x, 2 * spec.top_k)
    outputs = builder.op(
        "MoE",
        rows,
        _hot(builder, builder.op("Concat", experts, experts, axis=-1), spec, _UNCHOSEN, 0.0),
        builder.matrix(into, spec.experts, 2 * spec.width, hidden),
        None,
        builder.matrix(out_of, spec.experts, hidden, spec.width),
        domain=MICROSOFT,
        **_SWIGLU,
    )
    # MoE clears its output first, and takes its input's memory for it where nobody needs that any more.
    return builder.first(builder.op("Concat", outputs, rows, axis=1), spec.top_k, axis=1)


def _repeated(builder: Builder, x: ir.Value, times: int) -> ir.Value:
    """(rows, times, width)"""
    return builder.op("Expand", x, builder.ints(1, times, 1))


def _hot(builder: Builder, experts: ir.Value, spec: MoeFfn, off: float, on: float) -> ir.Value:
    """One row of router scores for each entry of `experts`: (entries, number of experts)."""
    flat = builder.reshape(experts, -1)
    return builder.op("OneHot", flat, builder.ints(spec.experts), builder.floats(off, on), axis=-1)
