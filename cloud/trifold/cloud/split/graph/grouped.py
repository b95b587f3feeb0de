"""Grouped-query attention: Llama, Qwen3, Mixtral, OLMoE."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trifold.cloud.split.graph.attention import Heads, Places, attend
from trifold.cloud.split.graph.builder import Builder
from trifold.cloud.split.graph.matrix import heads, stack, vector_of_heads, whole
from trifold.shared.model.heads import HeadLayout, Order, filled
from trifold.shared.model.names import GroupedNames
from trifold.shared.model.spec import GroupedAttention


def grouped(
    builder: Builder, x: ir.Value, layer: int, spec: GroupedAttention, names: GroupedNames, places: Places
) -> ir.Value:
    """Attention of rows x (rows, hidden), before the residual."""
    source, values = builder.source, np.arange(spec.head_dim)
    layout = HeadLayout.of(spec)
    turned = layout.order(values, values[:0])
    straight = filled(values, layout.size)

    parts = ((names.q, turned), (names.k, turned), (names.v, straight))
    weight = stack([heads(source, name, spec.head_dim, order) for name, order in parts])
    qkv = builder.linear(x, weight, _bias(builder, spec, names, turned, straight))
    if spec.qk_norm or spec.clip is not None:
        qkv = _normed(builder, qkv, spec, names, layout.size, turned)
    shape = Heads(spec.heads, spec.kv_heads, layout.size, spec.head_dim, spec.softmax_scale)
    out = attend(builder, qkv, layer, shape, places)
    return builder.linear(out, whole(source, names.o), builder.vector(names.o_bias) if names.o_bias else None)


def _bias(
    builder: Builder, spec: GroupedAttention, names: GroupedNames, turned: Order, straight: Order
) -> ir.Value | None:
    parts = ((names.q_bias, turned), (names.k_bias, turned), (names.v_bias, straight))
    biases = [
        vector_of_heads(builder.source.vector(name), spec.head_dim, order) for name, order in parts if name
    ]
    return builder.tensor(np.concatenate(biases)) if biases else None


def _normed(
    builder: Builder, qkv: ir.Value, spec: GroupedAttention, names: GroupedNames, size: int, order: Order
) -> ir.Value:
    """Queries and keys normed, then all three clipped, where the model does so."""
    query, key, value = builder.split(qkv, spec.heads * size, spec.kv_heads * size, spec.kv_heads * size)
    if names.q_norm and names.k_norm:
        query = _norm(builder, query, names.q_norm, (spec.heads, spec.head_dim, size), order)
        key = _norm(builder, key, names.k_norm, (spec.kv_heads, spec.head_dim, size), order)
    joined = builder.op("Concat", query, key, value, axis=-1)
    if spec.clip is None:
        return joined
    return builder.op("Clip", joined, builder.scalar(-spec.clip), builder.scalar(spec.clip))


def _norm(builder: Builder, x: ir.Value, name: str, heads: tuple[int, int, int], order: Order) -> ir.Value:
    """RMSNorm of every head, or of all at once: as wide as its weight.

    `heads` is how many there are, of how many values, without and with blanks. The mean of the squares is
    taken over blanks too; epsilon and weight make up for that.
    """
    count, values, size = heads
    share = values / size
    weight = vector_of_heads(builder.source.vector(name), values, order) * np.float32(share**0.5)
    normed = builder.norm(builder.reshape(x, -1, len(weight)), builder.tensor(weight), builder.eps * share)
    return builder.reshape(normed, -1, count * size)
