"""Multi-head latent attention of DeepSeek-V2 and V3, expanded: each head gets its own key and value."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trifold.cloud.split.graph.attention import Heads, Places, attend
from trifold.cloud.split.graph.builder import Builder
from trifold.cloud.split.graph.matrix import heads, reorder, stack, whole
from trifold.shared.model.heads import BLANK, HeadLayout, Order
from trifold.shared.model.names import LatentNames
from trifold.shared.model.spec import LatentAttention


def latent(
    builder: Builder,
    x: ir.Value,
    layer: int,
    spec: LatentAttention,
    names: LatentNames,
    places: Places,
    interleaved: bool,
) -> ir.Value:
    """Attention of rows x (rows, hidden), before the residual.

    `interleaved` says that the checkpoint has rotated pairs side by side. The rotated key is the same for all
    heads. Queries, keys and values get blanks up to one size (HeadLayout).
    """
    source, count = builder.source, spec.heads
    layout = HeadLayout.of(spec)
    pairs = np.arange(spec.rope_dim)
    rotated = np.concatenate([pairs[0::2], pairs[1::2]]) if interleaved else pairs
    query_head = spec.nope_dim + spec.rope_dim
    query_order = layout.order(spec.nope_dim + rotated, np.arange(spec.nope_dim))
    turned = layout.turned(rotated)
    key_order = np.concatenate(
        [np.arange(spec.kv_rank), np.where(turned == BLANK, BLANK, spec.kv_rank + turned)]
    )

    # One product for all that starts from x: queries (compressed or not), the latent, the rotated key.
    keys = heads(source, names.kv_a, spec.kv_rank + spec.rope_dim, key_order)
    queries = whole(source, names.q_a) if names.q_a else heads(source, names.q or "", query_head, query_order)
    bias = _bias(builder, names, queries.outputs, key_order)
    start = builder.linear(x, stack([queries, keys]), bias)
    query, compressed, rotated_key = builder.split(start, queries.outputs, spec.kv_rank, len(turned))
    if names.q_a_norm and names.q_b:
        query = builder.norm(query, builder.vector(names.q_a_norm), spec.norm_eps)
        query = builder.linear(query, heads(source, names.q_b, query_head, query_order))

    compressed = builder.norm(compressed, builder.vector(names.kv_a_norm), spec.norm_eps)
    expanded = builder.linear(compressed, whole(source, names.kv_b))
    plain_key, value = builder.split(
        builder.reshape(expanded, -1, count, spec.nope_dim + spec.v_dim), spec.nope_dim, spec.v_dim
    )
    key = builder.op(
        "Add",
        _placed(builder, plain_key, spec.nope_dim, at=len(turned), size=layout.size),
        _placed(
            builder, builder.reshape(rotated_key, -1, 1, len(turned)), len(turned), at=0, size=layout.size
        ),
    )
    query = builder.reshape(query, -1, count, layout.size)
    value = _placed(builder, value, spec.v_dim, at=0, size=layout.size)
    qkv = builder.reshape(builder.op("Concat", query, key, value, axis=1), -1, 3 * count * layout.size)
    shape = Heads(count, count, layout.size, spec.v_dim, spec.softmax_scale)
    out = attend(builder, qkv, layer, shape, places)
    return builder.linear(out, whole(source, names.o), builder.vector(names.o_bias) if names.o_bias else None)


def _placed(builder: Builder, x: ir.Value, width: int, at: int, size: int) -> ir.Value:
    """x (rows, heads, width) between zeros, from value `at` of a head of `size` on."""
    if width == size:
        return x
    return builder.op("Pad", x, builder.ints(0, 0, at, 0, 0, size - at - width))


def _bias(builder: Builder, names: LatentNames, queries: int, key_order: Order) -> ir.Value | None:
    if names.kv_a_bias is None:
        return None
    query = builder.source.vector(names.q_a_bias) if names.q_a_bias else np.zeros(queries, np.float32)
    key = reorder(builder.source.vector(names.kv_a_bias), key_order)
    return builder.tensor(np.concatenate([query, key]))
