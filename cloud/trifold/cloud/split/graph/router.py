"""The router: which experts a row goes to, with what weight. Always fp32: a quantized one flips experts."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from trifold.cloud.split.graph.builder import Builder
from trifold.cloud.split.graph.matrix import whole
from trifold.shared.model.names import MoeNames
from trifold.shared.model.spec import MoeFfn

NEVER: Final = 1e30
"""What makes a score lower than any other."""


def route(builder: Builder, x: ir.Value, spec: MoeFfn, names: MoeNames) -> tuple[ir.Value, ir.Value]:
    """The chosen experts (rows, 1, top_k), int64, best first, and their weights (rows, 1, top_k)."""
    logits = builder.linear_fp32(x, whole(builder.source, names.router))
    if spec.scoring == "softmax" and spec.normalize and spec.groups == 1 and not names.router_bias:
        # The softmax of those chosen is the softmax of all, normalized.
        best, experts = _top(builder, logits, spec.top_k)
        return experts, _scaled(builder, builder.op("Softmax", best, axis=-1), spec)
    scores = (
        builder.op("Sigmoid", logits) if spec.scoring == "sigmoid" else builder.op("Softmax", logits, axis=-1)
    )
    choice = builder.op("Add", scores, builder.vector(names.router_bias)) if names.router_bias else scores
    if spec.groups > 1:
        choice = _within_best_groups(builder, choice, spec)
    best, experts = _top(builder, choice, spec.top_k)
    weights = builder.op("GatherElements", scores, experts, axis=-1) if names.router_bias else best
    if not spec.normalize:
        return experts, _scaled(builder, weights, spec)
    # The sum is a product with a constant, whose bits do not depend on other rows.
    even = builder.filled(1 / spec.routed_scale, spec.top_k, spec.top_k)
    return experts, builder.op("Div", weights, builder.op("MatMul", weights, even))


def _top(builder: Builder, scores: ir.Value, count: int) -> tuple[ir.Value, ir.Value]:
    values, places = builder.op_of(2, "TopK", scores, builder.ints(count), axis=-1)
    return values, places


def _scaled(builder: Builder, weights: ir.Value, spec: MoeFfn) -> ir.Value:
    return (
        weights if spec.routed_scale == 1 else builder.op("Mul", weights, builder.scalar(spec.routed_scale))
    )


def _within_best_groups(builder: Builder, choice: ir.Value, spec: MoeFfn) -> ir.Value:
    """`choice` (rows, 1, experts), lowered by NEVER outside the `top_groups` best groups."""
    grouped = builder.reshape(choice, -1, spec.groups, spec.experts // spec.groups)
    if spec.group_score == "max":
        score = builder.op("ReduceMax", grouped, builder.ints(-1), keepdims=0)
    else:
        score = builder.op("ReduceSum", _top(builder, grouped, 2)[0], builder.ints(-1), keepdims=0)
    _, groups = _top(builder, score, spec.top_groups)
    hot = builder.op("OneHot", groups, builder.ints(spec.groups), builder.floats(-NEVER, 0), axis=1)
    lowered = builder.op("Add", grouped, builder.op("ReduceMax", hot, builder.ints(2), keepdims=1))
    return builder.reshape(lowered, -1, 1, spec.experts)
