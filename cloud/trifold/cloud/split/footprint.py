"""What a piece of a model costs: bytes of weights and KV, bytes read and operations done for a token.

Figures are those of the shards that `trifold split` writes. Matrices are quantized in blocks of 32 values
with an fp32 scale, embedding and head never to less than int8; routers, norms, biases and KV are fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from trifold.shared.bundle.manifest import Quantization
from trifold.shared.model.heads import HeadLayout, kept_heads
from trifold.shared.model.parameters import Parameters, of_embedding, of_head, of_layer
from trifold.shared.model.spec import Attention, LatentAttention, ModelSpec

FLOAT: Final = 4
BLOCK: Final = 32
BYTES: Final[dict[Quantization, float]] = {
    "int8": 1 + FLOAT / BLOCK,
    "int4": 0.5 + FLOAT / BLOCK,
    "none": FLOAT,
}
"""Bytes of a quantized weight, its share of the scale included."""
VOCABULARY: Final[dict[Quantization, float]] = {**BYTES, "int4": BYTES["int8"]}
"""The same for embedding and head."""


@dataclass(frozen=True)
class Footprint:
    """Costs of a piece; pieces add up with +. Bytes and operations are those of one token."""

    parameters: Parameters = field(default_factory=Parameters)
    weight_bytes: int = 0
    read_bytes: int = 0
    """Weights that a token needs: the experts it visits, one row of the embedding."""
    kv_bytes: int = 0
    """KV of one position."""
    flops: int = 0
    """Two for each weight of a matrix product that the token takes part in."""
    position_flops: int = 0
    """Two for each value of a key or value, for every position that the token attends to."""

    def memory(self, positions: int) -> int:
        """Bytes of the weights, and of one session's KV for so many positions."""
        return self.weight_bytes + self.kv_bytes * positions

    def operations(self, positions: int) -> int:
        """Floating-point operations of a token that attends to so many positions."""
        return self.flops + self.position_flops * positions

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(
            self.parameters + other.parameters,
            self.weight_bytes + other.weight_bytes,
            self.read_bytes + other.read_bytes,
            self.kv_bytes + other.kv_bytes,
            self.flops + other.flops,
            self.position_flops + other.position_flops,
        )


def footprint_of_embedding(spec: ModelSpec, quantization: Quantization) -> Footprint:
    parameters, width = of_embedding(spec), VOCABULARY[quantization]
    return Footprint(parameters, int(width * parameters.embedding), int(width * spec.hidden))


def footprint_of_layer(spec: ModelSpec, index: int, quantization: Quantization) -> Footprint:
    layer = spec.layers[index]
    parameters, width = of_layer(layer, spec.hidden), BYTES[quantization]
    exact = FLOAT * (parameters.router + parameters.vectors)
    absorbed = _absorbed(layer.attention, spec.hidden)
    matrices = parameters.total - parameters.router - parameters.vectors + absorbed
    weight_bytes = exact + int(width * matrices)
    heads, size = layer.attention.heads, HeadLayout.of(layer.attention).size
    return Footprint(
        parameters,
        weight_bytes,
        read_bytes=weight_bytes - int(width * parameters.experts_idle),
        kv_bytes=FLOAT * kept_heads(layer.attention) * size,
        flops=2 * (parameters.multiplied + absorbed),
        position_flops=2 * heads * 2 * size,
    )


def _absorbed(attention: Attention, hidden: int) -> int:
    """Weights that latent attention has more (or fewer) in a shard than in the checkpoint: kv_b is multiplied
    into the queries' and the output's, and heads have blanks."""
    if not isinstance(attention, LatentAttention):
        return 0
    layout, heads = HeadLayout.of(attention), attention.heads
    inputs = hidden if attention.q_rank is None else attention.q_rank
    queries = inputs * heads * (layout.size - attention.nope_dim - attention.rope_dim)
    rotated = hidden * (2 * layout.half - attention.rope_dim)
    output = hidden * heads * (attention.kv_rank - attention.v_dim)
    return queries + rotated + output - attention.kv_rank * heads * (attention.nope_dim + attention.v_dim)


def footprint_of_head(spec: ModelSpec, quantization: Quantization) -> Footprint:
    parameters = of_head(spec)
    weight_bytes = int(VOCABULARY[quantization] * parameters.head) + FLOAT * parameters.vectors
    return Footprint(parameters, weight_bytes, weight_bytes, flops=2 * parameters.multiplied)
