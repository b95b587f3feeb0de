"""The graph of a core for TensorRT: rows -> its layers -> rows, for a batch of sessions."""

from __future__ import annotations

import onnx_ir as ir

from trifold.cloud.core.engines.tensorrt.attention import Sessions
from trifold.cloud.core.engines.tensorrt.feed_forward import mixture, swiglu
from trifold.cloud.core.engines.tensorrt.grouped import grouped
from trifold.cloud.core.engines.tensorrt.latent import latent
from trifold.cloud.core.engines.tensorrt.operators import StandardBuilder
from trifold.cloud.core.engines.tensorrt.precision import Precision
from trifold.cloud.core.engines.tensorrt.typed_weights import TypedWeights
from trifold.cloud.split.graph.builder import FLOAT
from trifold.cloud.split.graph.matrix import Source
from trifold.shared.model.names import DenseNames, GroupedNames, LatentNames, MoeNames
from trifold.shared.model.spec import GroupedAttention, LatentAttention, ModelSpec, MoeFfn

REVISION = 1
"""Of the graph: an engine that was built from another one is not taken."""


def build(source: Source, layers: range, slots: int, precision: Precision, weights: TypedWeights) -> bytes:
    """The ONNX file of these layers; its weights go to `weights`.

    Inputs: `rows` (sessions, rows, hidden) in fp32, `positions` and `write_at` (Sessions), and for each cache
    `past_…`; outputs: `rows_out`, and for each cache `present_…`, which must lie where `past_…` does.
    """
    spec = source.checkpoint.spec
    builder = StandardBuilder(source, weights, precision, spec.norm_eps)
    shape: list[int | str] = ["sessions", "rows", spec.hidden]
    given = builder.input("rows", FLOAT, shape)
    sessions = Sessions.inputs(builder, spec.rope, slots)
    x = builder.reshape(given, -1, spec.hidden)
    for layer in layers:
        x = _layer(builder, x, spec, layer, sessions)
    whole = builder.op("Concat", sessions.shape, builder.ints(spec.hidden), axis=0)
    builder.output(builder.op("Reshape", x, whole), "rows_out", shape)
    return builder.finish("core")


def _layer(
    builder: StandardBuilder, x: ir.Value, spec: ModelSpec, layer: int, sessions: Sessions
) -> ir.Value:
    names = builder.source.checkpoint.names.layer(layer)
    normed = builder.norm(x, builder.vector(names.input_norm))
    low, bound = builder.low(normed), builder.bound(names.input_norm)
    update = low
    match spec.layers[layer].attention, names.attention:
        case GroupedAttention() as heads, GroupedNames() as head_names:
            update = grouped(builder, low, layer, heads, head_names, sessions, bound)
        case LatentAttention() as latents, LatentNames() as latent_names:
            update = latent(builder, low, layer, latents, latent_names, sessions, bound)
    x = builder.op("Add", x, builder.full(update))
    normed = builder.norm(x, builder.vector(names.post_norm))
    low, bound = builder.low(normed), builder.bound(names.post_norm)
    match spec.layers[layer].ffn, names.ffn:
        case MoeFfn() as moe, MoeNames() as moe_names:
            update = mixture(builder, normed, low, moe, moe_names, bound)
        case _, DenseNames() as dense_names:
            update = swiglu(builder, low, dense_names, bound)
    return builder.op("Add", x, builder.full(update))
