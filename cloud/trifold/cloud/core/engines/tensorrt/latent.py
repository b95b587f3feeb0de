"""Multi-head latent attention of DeepSeek-V2 and V3, over the latent: one key for all heads, and no value.

TensorRT asks for values as wide as keys. A key is the rotated part, then the latent, so the same cache serves
as both, and what attention makes of the rotated part is cut off.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trifold.cloud.core.engines.tensorrt.attention import Sessions, attend, by_head, kept, turned
from trifold.cloud.core.engines.tensorrt.operators import StandardBuilder
from trifold.cloud.split.graph.absorb import absorbed_output, absorbed_queries
from trifold.cloud.split.graph.latent import start_bias
from trifold.cloud.split.graph.matrix import heads, stack, whole
from trifold.shared.model.heads import BLANK, HeadLayout
from trifold.shared.model.names import LatentNames
from trifold.shared.model.spec import LatentAttention


def latent(
    builder: StandardBuilder,
    low: ir.Value,
    layer: int,
    spec: LatentAttention,
    names: LatentNames,
    sessions: Sessions,
    bound: float,
) -> ir.Value:
    """Attention of rows low (rows, hidden) that are within `bound`, before the residual, low."""
    source, layout = builder.source, HeadLayout.of(spec)
    interleaved = source.checkpoint.names.layout.rope_interleaved
    pairs = np.arange(spec.rope_dim)
    order = layout.turned(np.concatenate([pairs[0::2], pairs[1::2]]) if interleaved else pairs)
    rotated = len(order)
    key_order = np.concatenate(
        [np.where(order == BLANK, BLANK, order + spec.kv_rank), np.arange(spec.kv_rank)]
    )
    keys = heads(source, names.kv_a, spec.kv_rank + spec.rope_dim, key_order)

    absorbed = absorbed_queries(source, names.q_b or names.q or "", names.kv_b, spec, order)
    queries = whole(source, names.q_a) if names.q_a else absorbed
    weight, bias = stack([queries, keys]), start_bias(builder, names, queries.outputs, key_order)
    start = builder.full(builder.project(low, weight, bias, bound))
    query, key, compressed = builder.split(start, queries.outputs, rotated, spec.kv_rank)
    if names.q_a_norm:
        normed = builder.norm(query, builder.vector(names.q_a_norm), spec.norm_eps)
        within = builder.bound(names.q_a_norm)
        query = builder.full(builder.project(builder.low(normed), absorbed, bound=within))

    compressed = builder.norm(compressed, builder.vector(names.kv_a_norm), spec.norm_eps)
    blanks = layout.size - rotated - spec.kv_rank
    if blanks:
        compressed = builder.op("Pad", compressed, builder.ints(0, 0, 0, blanks))
    key = builder.op("Concat", key, compressed, axis=-1)
    query = by_head(builder, query, spec.heads, sessions)
    query = turned(builder, query, rotated, sessions, spec.softmax_scale)
    key = turned(builder, by_head(builder, key, 1, sessions), rotated, sessions)
    key = kept(builder, key, f"latent_{layer}", 1, layout.size, sessions)
    out = attend(builder, query, key, key, spec.heads, layout.size, sessions)
    ends = (builder.ints(rotated), builder.ints(rotated + spec.kv_rank), builder.ints(2))
    out = builder.reshape(builder.op("Slice", out, *ends), -1, spec.heads * spec.kv_rank)
    o_bias = builder.vector(names.o_bias) if names.o_bias else None
    return builder.project(out, absorbed_output(source, names.o, names.kv_b, spec), o_bias)
