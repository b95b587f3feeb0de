"""The graph of one tier.

edge    token ids -> embedding, its layers -> rows
cloud   rows -> its layers -> rows
device  rows -> its layers, norm, head of the rows that are asked for -> logits
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from trifold.cloud.split.graph.attention import Places
from trifold.cloud.split.graph.builder import END, FLOAT, MICROSOFT, Builder
from trifold.cloud.split.graph.dense import swiglu
from trifold.cloud.split.graph.experts import mixture
from trifold.cloud.split.graph.grouped import grouped
from trifold.cloud.split.graph.latent import latent
from trifold.cloud.split.graph.matrix import Source, whole
from trifold.cloud.split.graph.quantize import BLOCK, Bits
from trifold.cloud.split.graph.weights import WeightsFile
from trifold.shared.bundle.manifest import Cuts, Quantization, Tier
from trifold.shared.model.heads import HeadLayout
from trifold.shared.model.names import DenseNames, GroupedNames, LatentNames, MoeNames
from trifold.shared.model.spec import GroupedAttention, LatentAttention, ModelSpec, MoeFfn

_BITS: Final[dict[Quantization, Bits | None]] = {"int8": 8, "int4": 4, "none": None}

VOCABULARY_BITS: Final[Bits] = 8
"""Embedding and head keep int8 in an int4 bundle: head in int4 costs 4e-3 KL, in int8 3e-5."""


def build(source: Source, tier: Tier, cuts: Cuts, quantization: Quantization, weights: WeightsFile) -> bytes:
    """The ONNX file of a tier; its weights go to `weights`."""
    spec = source.checkpoint.spec
    builder = Builder(source, weights, _BITS[quantization], spec.norm_eps)
    span = cuts.layers(tier, len(spec.layers))
    x = (
        _embedding(builder, spec)
        if tier == "edge"
        else builder.input("rows", FLOAT, ["rows", 1, spec.hidden])
    )
    stream = Stream(builder, x)
    if span:
        latent = any(isinstance(spec.layers[layer].attention, LatentAttention) for layer in span)
        places = Places.inputs(builder, HeadLayout(spec.rope.dim, 0).half, latent=latent)
        for layer in span:
            _layer(stream, spec, layer, places)
    if tier == "device":
        _head(stream, spec, choose=bool(span))
    else:
        builder.output(stream.sum(), "rows_out", ["rows", 1, spec.hidden])
    return builder.finish(tier)


class Stream:
    """The residual stream: what every part reads normed and adds its update to."""

    def __init__(self, builder: Builder, x: ir.Value) -> None:
        self.builder = builder
        self._residual = x
        self._update: ir.Value | None = None

    def normed(self, weight: str) -> ir.Value:
        """The stream after the last update, through the RMSNorm of that name."""
        gain = self.builder.vector(weight)
        if self._update is None:
            return self.builder.norm(self._residual, gain)
        normed, self._residual = self.builder.add_norm(self._update, self._residual, gain)
        return normed

    def add(self, update: ir.Value) -> None:
        """To be called once after each `normed`."""
        self._update = update

    def sum(self) -> ir.Value:
        return (
            self._residual if self._update is None else self.builder.op("Add", self._update, self._residual)
        )


def _layer(stream: Stream, spec: ModelSpec, layer: int, places: Places) -> None:
    builder, part = stream.builder, spec.layers[layer]
    names = builder.source.checkpoint.names.layer(layer)
    x = stream.normed(names.input_norm)
    match part.attention, names.attention:
        case GroupedAttention() as heads, GroupedNames() as head_names:
            stream.add(grouped(builder, x, layer, heads, head_names, places))
        case LatentAttention() as latents, LatentNames() as latent_names:
            interleaved = builder.source.checkpoint.names.layout.rope_interleaved
            stream.add(latent(builder, x, layer, latents, latent_names, places, interleaved))
    x = stream.normed(names.post_norm)
    match part.ffn, names.ffn:
        case MoeFfn() as moe, MoeNames() as moe_names:
            stream.add(mixture(builder, x, spec.hidden, moe, moe_names))
        case _, DenseNames() as dense_names:
            stream.add(swiglu(builder, x, dense_names))


def _embedding(builder: Builder, spec: ModelSpec) -> ir.Value:
    """The rows of token ids."""
    tokens = builder.input("tokens", ir.DataType.INT64, ["rows", 1])
    table = whole(builder.source, builder.source.checkpoint.names.embedding)
    if builder.bits is None:
        return builder.op("Gather", builder.matrix(table, spec.vocab, spec.hidden), tokens, axis=0)
    codes, scales = builder.quantized(table, VOCABULARY_BITS, spec.vocab)
    rows = builder.op(
        "GatherBlockQuantized",
        codes,
        tokens,
        scales,
        domain=MICROSOFT,
        bits=VOCABULARY_BITS,
        block_size=BLOCK,
        gather_axis=0,
        quantize_axis=1,
    )
    return rows if spec.hidden % BLOCK == 0 else builder.first(rows, spec.hidden, axis=2)


def _head(stream: Stream, spec: ModelSpec, choose: bool) -> None:
    """Logits of all rows or, where attention needs every row, of those from input `logits_from` (1) on."""
    builder, names = stream.builder, stream.builder.source.checkpoint.names
    x = stream.normed(names.final_norm)
    if choose:
        start = builder.input("logits_from", ir.DataType.INT64, [1])
        x = builder.op("Slice", x, start, builder.ints(END), builder.ints(0))
    logits = builder.linear(x, whole(builder.source, names.head), bits=VOCABULARY_BITS)
    builder.output(logits, "logits", ["chosen", 1, spec.vocab])
