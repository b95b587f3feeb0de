"""Grouped-query attention: Llama, Qwen3, Mixtral, OLMoE."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from trifold.cloud.core.engines.tensorrt.attention import Sessions, attend, by_head, kept, turned
from trifold.cloud.core.engines.tensorrt.operators import StandardBuilder
from trifold.cloud.split.graph.matrix import heads, stack, vector_of_heads, whole
from trifold.shared.model.heads import HeadLayout, Order, filled
from trifold.shared.model.names import GroupedNames
from trifold.shared.model.spec import GroupedAttention


def grouped(
    builder: StandardBuilder,
    low: ir.Value,
    layer: int,
    spec: GroupedAttention,
    names: GroupedNames,
    sessions: Sessions,
    bound: float,
) -> ir.Value:
    """Attention of rows low (rows, hidden) that are within `bound`, before the residual, low."""
    source, values, layout = builder.source, np.arange(spec.head_dim), HeadLayout.of(spec)
    order, straight = layout.order(values, values[:0]), filled(values, layout.size)
    parts = ((names.q, order), (names.k, order), (names.v, straight))
    weight = stack([heads(source, name, spec.head_dim, turn) for name, turn in parts])
    biases = ((names.q_bias, order), (names.k_bias, order), (names.v_bias, straight))
    qkv = builder.full(builder.project(low, weight, _bias(builder, biases, spec.head_dim), bound))

    query, key, value = _normed(builder, qkv, spec, names, layout.size, order)
    rotated = 2 * layout.half
    query = by_head(builder, query, spec.heads, sessions)
    query = turned(builder, query, rotated, sessions, spec.softmax_scale)
    key = turned(builder, by_head(builder, key, spec.kv_heads, sessions), rotated, sessions)
    value = builder.op("Transpose", by_head(builder, value, spec.kv_heads, sessions), perm=[0, 2, 1, 3])
    key = kept(builder, key, f"key_{layer}", spec.kv_heads, layout.size, sessions)
    value = kept(builder, builder.low(value), f"value_{layer}", spec.kv_heads, layout.size, sessions)
    out = attend(builder, query, key, value, spec.heads, layout.size, sessions)
    if layout.size != spec.head_dim:
        out = builder.first(out, spec.head_dim, axis=2)
    out = builder.reshape(out, -1, spec.heads * spec.head_dim)
    bias = builder.vector(names.o_bias) if names.o_bias else None
    return builder.project(out, whole(source, names.o), bias)


def _bias(
    builder: StandardBuilder, parts: Sequence[tuple[str | None, Order]], head_dim: int
) -> ir.Value | None:
    biases = [vector_of_heads(builder.source.vector(name), head_dim, order) for name, order in parts if name]
    return builder.tensor(np.concatenate(biases)) if biases else None


def _normed(
    builder: StandardBuilder,
    qkv: ir.Value,
    spec: GroupedAttention,
    names: GroupedNames,
    size: int,
    order: Order,
) -> Sequence[ir.Value]:
    """Queries and keys normed, then all three clipped, where the model does so: (rows, heads · size) each.

    The mean of the squares is taken over the blanks of a head too; epsilon and weight make up for that.
    """
    counts = (spec.heads, spec.kv_heads, spec.kv_heads)
    parts = [*builder.split(qkv, *(count * size for count in counts))]
    share = spec.head_dim / size
    for place, name in enumerate((names.q_norm, names.k_norm)):
        if name is None:
            continue
        width = size if spec.qk_norm == "head" else counts[place] * size
        gain = vector_of_heads(builder.source.vector(name), spec.head_dim, order) * np.float32(share**0.5)
        rows = builder.reshape(parts[place], -1, counts[place] * size // width, width)
        normed = builder.norm(rows, builder.tensor(gain), builder.eps * share)
        parts[place] = builder.reshape(normed, -1, counts[place] * size)
    if spec.clip is None:
        return parts
    return [builder.op("Clip", part, builder.scalar(-spec.clip), builder.scalar(spec.clip)) for part in parts]
