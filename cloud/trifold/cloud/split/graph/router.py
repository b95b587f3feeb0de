"""The router: which experts a row goes to, with what weight. Always fp32: a quantized one flips experts."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from trifold.cloud.split.graph.builder import Builder
from trifold.cloud.split.graph.matrix import whole
from trifold.shared.model.names import MoeNames
from trifold.shared.model.spec import MoeFfn

NEVER: Final = -1e30
"""The score of an expert that cannot be chosen: below any other, and finite."""


def route(builder: Builder, x: ir.Value, spec: MoeFfn, names: MoeNames) -> tuple[ir.Value, ir.Value]:
    """The chosen experts (rows, top_k), int64, best first, and their weights (rows, top_k)."""
    logits = builder.linear_fp32(x, whole(builder.source, names.router))
    scores = (
        builder.op("Sigmoid", logits) if spec.scoring == "sigmoid" else builder.op("Softmax", logits, axis=-1)
    )
    choice = builder.op("Add", scores, builder.vector(names.router_bias)) if names.router_bias else scores
    if spec.groups > 1:
        choice = _within_best_groups(builder, choice, spec)
    _, experts = builder.op_of(2, "TopK", choice, builder.ints(spec.top_k), axis=-1)
    return experts, _weights(builder, builder.op("GatherElements", scores, experts, axis=1), spec)


def _within_best_groups(builder: Builder, choice: ir.Value, spec: MoeFfn) -> ir.Value:
    """`choice` (rows, experts) with NEVER outside the `top_groups` best groups."""
    grouped = builder.reshape(choice, -1, spec.groups, spec.experts // spec.groups)
    best, _ = builder.op_of(2, "TopK", grouped, builder.ints(1 if spec.group_score == "max" else 2), axis=-1)
    score = builder.op("ReduceSum", best, builder.ints(-1), keepdims=0)
    _, groups = builder.op_of(2, "TopK", score, builder.ints(spec.top_groups), axis=-1)
    hot = builder.op("OneHot", groups, builder.ints(spec.groups), builder.floats(0, 1), axis=-1)
    chosen = builder.op("ReduceMax", hot, builder.ints(1), keepdims=0)
    open_ = builder.op("Cast", builder.op("Unsqueeze", chosen, builder.ints(2)), to=ir.DataType.BOOL)
    masked = builder.op("Where", open_, grouped, builder.scalar(NEVER))
    return builder.reshape(masked, -1, spec.experts)


def _weights(builder: Builder, scores: ir.Value, spec: MoeFfn) -> ir.Value:
    """Normalized and scaled. The sum is a product with a constant, whose bits do not depend on other rows."""
    if spec.normalize:
        return builder.op("Div", scores, builder.op("MatMul", scores, _even(builder, spec)))
    return scores if spec.routed_scale == 1 else builder.op("Mul", scores, builder.scalar(spec.routed_scale))


def _even(builder: Builder, spec: MoeFfn) -> ir.Value:
    """(top_k, top_k) of 1 / routed_scale."""
    return builder.filled(1 / spec.routed_scale, spec.top_k, spec.top_k)
