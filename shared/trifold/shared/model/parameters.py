"""How many parameters each piece of a model has, by kind and without looking at any weight."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from trifold.shared.model.spec import Attention, Ffn, GroupedAttention, Layer, ModelSpec, MoeFfn


@dataclass(frozen=True)
class Parameters:
    """Counts by kind. Pieces add up with +.

    `experts_idle` is the part of `experts` that a token does not visit: `active` leaves it out. The embedding
    counts as active whole, as it does on model cards.
    """

    embedding: int = 0
    attention: int = 0
    dense: int = 0
    router: int = 0
    experts: int = 0
    experts_idle: int = 0
    shared: int = 0
    vectors: int = 0
    """Norms and biases."""
    head: int = 0

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def total(self) -> int:
        ffn = self.dense + self.router + self.experts + self.shared
        return self.embedding + self.attention + ffn + self.vectors + self.head

    @property
    def active(self) -> int:
        return self.total - self.experts_idle

    @property
    def multiplied(self) -> int:
        """Weights of the matrix products that one token takes part in."""
        return self.active - self.embedding - self.vectors


def of_embedding(spec: ModelSpec) -> Parameters:
    return Parameters(embedding=spec.vocab * spec.hidden)


def of_layer(layer: Layer, hidden: int) -> Parameters:
    return (
        _of_attention(layer.attention, hidden) + _of_ffn(layer.ffn, hidden) + Parameters(vectors=2 * hidden)
    )


def of_head(spec: ModelSpec) -> Parameters:
    """Final norm and head. A tied head counts like any other: the tier that runs it needs the weights."""
    return Parameters(head=spec.vocab * spec.hidden, vectors=spec.hidden)


def of_model(spec: ModelSpec) -> Parameters:
    """The model as it is published: a tied head counts once."""
    whole = sum((of_layer(layer, spec.hidden) for layer in spec.layers), of_embedding(spec))
    return whole + (Parameters(vectors=spec.hidden) if spec.tied_head else of_head(spec))


def _of_attention(attention: Attention, hidden: int) -> Parameters:
    if isinstance(attention, GroupedAttention):
        q, kv = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        norms = {None: 0, "head": 2 * attention.head_dim, "all": q + kv}[attention.qk_norm]
        biases = attention.qkv_bias * (q + 2 * kv) + attention.output_bias * hidden
        return Parameters(attention=hidden * (2 * q + 2 * kv), vectors=norms + biases)
    q = attention.heads * (attention.nope_dim + attention.rope_dim)
    kv_a = attention.kv_rank + attention.rope_dim
    rank = attention.q_rank
    queries = hidden * q if rank is None else rank * (hidden + q)
    latent = hidden * kv_a + attention.kv_rank * attention.heads * (attention.nope_dim + attention.v_dim)
    output = hidden * attention.heads * attention.v_dim
    biases = attention.bias * ((rank or 0) + kv_a + hidden)
    return Parameters(attention=queries + latent + output, vectors=(rank or 0) + attention.kv_rank + biases)


def _of_ffn(ffn: Ffn, hidden: int) -> Parameters:
    if not isinstance(ffn, MoeFfn):
        return Parameters(dense=3 * hidden * ffn.width, vectors=ffn.bias * (2 * ffn.width + hidden))
    expert = 3 * hidden * ffn.width
    return Parameters(
        router=ffn.experts * hidden,
        experts=ffn.experts * expert,
        experts_idle=(ffn.experts - ffn.top_k) * expert,
        shared=3 * hidden * ffn.shared_width,
        vectors=ffn.correction_bias * ffn.experts,
    )
