"""Multi-head latent attention of DeepSeek-V2 and V3, over the latent: one key and value for all heads."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trifold.cloud.split.graph.absorb import absorbed_output, absorbed_queries
from trifold.cloud.split.graph.attention import Heads, Places, attend
from trifold.cloud.split.graph.builder import END, MICROSOFT, Builder
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
    """Attention of rows x, before the residual. `interleaved`: the checkpoint has rotated pairs side by side.

    A key is the rotated part, then the latent; so is a value, whose rotated part nobody reads. As they are
    the same, one cache is enough, but for that the rotation has to come before the operator.
    """
    source, layout = builder.source, HeadLayout.of(spec)
    pairs = np.arange(spec.rope_dim)
    turned = layout.turned(np.concatenate([pairs[0::2], pairs[1::2]]) if interleaved else pairs)
    key_order = np.concatenate(
        [np.where(turned == BLANK, BLANK, turned + spec.kv_rank), np.arange(spec.kv_rank)]
    )
    keys = heads(source, names.kv_a, spec.kv_rank + spec.rope_dim, key_order)

    # One product for all that starts from x: queries, compressed or not, and the parts of the key.
    absorbed = absorbed_queries(source, names.q_b or names.q or "", names.kv_b, spec, turned)
    queries = whole(source, names.q_a) if names.q_a else absorbed
    start = builder.linear(x, stack([queries, keys]), start_bias(builder, names, queries.outputs, key_order))
    query, rotated, compressed = builder.split(start, queries.outputs, len(turned), spec.kv_rank)
    if names.q_a_norm:
        query = builder.norm(query, builder.vector(names.q_a_norm), spec.norm_eps)
        query = builder.linear(query, absorbed)

    compressed = builder.norm(compressed, builder.vector(names.kv_a_norm), spec.norm_eps)
    blanks = layout.size - len(turned) - spec.kv_rank
    if blanks:
        compressed = builder.op("Pad", compressed, builder.ints(0, 0, 0, 0, 0, blanks))
    straight = builder.op("Concat", query, rotated, compressed, axis=-1)
    by_head = builder.op(
        "RotaryEmbedding",
        builder.reshape(straight, 1, -1, (spec.heads + 1) * layout.size),
        places.positions,
        places.cos,
        places.sin,
        domain=MICROSOFT,
        num_heads=spec.heads + 1,
        rotary_embedding_dim=len(turned),
    )
    key = builder.op(
        "Slice", by_head, builder.ints(spec.heads * layout.size), builder.ints(END), builder.ints(2)
    )
    qkv = builder.op("Concat", by_head, key, axis=-1)
    shape = Heads(spec.heads, 1, layout.size, len(turned), spec.kv_rank, spec.softmax_scale, latent=True)
    out = attend(builder, qkv, layer, shape, places)
    bias = builder.vector(names.o_bias) if names.o_bias else None
    return builder.linear(out, absorbed_output(source, names.o, names.kv_b, spec), bias)


def start_bias(builder: Builder, names: LatentNames, queries: int, key_order: Order) -> ir.Value | None:
    """Of the product that starts from x: its queries may have none, the parts of the key have."""
    if names.kv_a_bias is None:
        return None
    query = builder.source.vector(names.q_a_bias) if names.q_a_bias else np.zeros(queries, np.float32)
    key = reorder(builder.source.vector(names.kv_a_bias), key_order)
    return builder.tensor(np.concatenate([query, key]))
