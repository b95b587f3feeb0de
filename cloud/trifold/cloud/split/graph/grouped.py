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
    """Attention of rows x, before the residual."""
    source, values = builder.source, np.arange(spec.head_dim)
    layout = HeadLayout.of(spec)
    turned = layout.order(values, values[:0])
    straight = filled(values, layout.size)

    parts = ((names.q, turned), (names.k, turned), (names.v, straight))
    weight = stack([heads(source, name, spec.head_dim, order) for name, order in parts])
    qkv = builder.linear(x, weight, _bias(builder, spec, names, turned, straight))
    if spec.qk_norm or spec.clip is not None:
        qkv = _normed(builder, qkv, spec, names, layout.size, turned)
    shape = Heads(spec.heads, spec.kv_heads, layout.size, 0, spec.head_dim, spec.softmax_scale, latent=False)
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
    """Queries and keys normed, then all three clipped, where the model does so.

    The mean of the squares is taken over the blanks of a head too; epsilon and weight make up for that.
    """
    heads = spec.heads + spec.kv_heads
    rows, value = builder.split(qkv, heads * size, spec.kv_heads * size)
    if names.q_norm and names.k_norm:
        share = spec.head_dim / size
        query, key = (
            vector_of_heads(builder.source.vector(name), spec.head_dim, order) * np.float32(share**0.5)
            for name in (names.q_norm, names.k_norm)
        )
        eps = builder.eps * share
        if spec.qk_norm == "head":
            weight = np.concatenate([np.tile(query, (spec.heads, 1)), np.tile(key, (spec.kv_heads, 1))])
            normed = builder.norm(builder.reshape(rows, -1, heads, size), builder.tensor(weight), eps)
            rows = builder.reshape(normed, -1, 1, heads * size)
        else:
            parts = zip(builder.split(rows, len(query), len(key)), (query, key), strict=True)
            normed_parts = [builder.norm(part, builder.tensor(weight), eps) for part, weight in parts]
            rows = builder.op("Concat", *normed_parts, axis=-1)
    joined = builder.op("Concat", rows, value, axis=-1)
    if spec.clip is None:
        return joined
    return builder.op("Clip", joined, builder.scalar(-spec.clip), builder.scalar(spec.clip))
