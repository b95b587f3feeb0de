"""The shape of every tensor that a spec needs: a weight is (outputs, inputs), a norm or bias (size,)."""

from __future__ import annotations

from collections.abc import Iterator

from trifold.shared.model.names import DenseNames, GroupedNames, LatentNames, MoeNames, Names
from trifold.shared.model.spec import DenseFfn, GroupedAttention, LatentAttention, MoeFfn

Shapes = Iterator[tuple[str | None, tuple[int, ...]]]
"""Pairs of name and shape; without a name the tensor is not there."""


def tensor_shapes(names: Names) -> dict[str, tuple[int, ...]]:
    """Shapes by checkpoint name, in the order of computation."""
    return {name: shape for name, shape in _model(names) if name is not None}


def _model(names: Names) -> Shapes:
    spec, hidden = names.spec, names.spec.hidden
    yield names.embedding, (spec.vocab, hidden)
    for index, layer in enumerate(spec.layers):
        at = names.layer(index)
        yield at.input_norm, (hidden,)
        match layer.attention, at.attention:
            case GroupedAttention() as grouped, GroupedNames() as grouped_names:
                yield from _grouped(grouped_names, grouped, hidden)
            case LatentAttention() as latent, LatentNames() as latent_names:
                yield from _latent(latent_names, latent, hidden)
        yield at.post_norm, (hidden,)
        match layer.ffn, at.ffn:
            case DenseFfn(width=width), DenseNames() as dense_names:
                yield from _swiglu(dense_names, width, hidden)
            case MoeFfn() as moe, MoeNames() as moe_names:
                yield from _moe(moe_names, moe, hidden)
    yield names.final_norm, (hidden,)
    yield names.head, (spec.vocab, hidden)


def _grouped(names: GroupedNames, spec: GroupedAttention, hidden: int) -> Shapes:
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    yield names.q, (q, hidden)
    yield names.k, (kv, hidden)
    yield names.v, (kv, hidden)
    yield names.q_bias, (q,)
    yield names.k_bias, (kv,)
    yield names.v_bias, (kv,)
    yield names.q_norm, (q if spec.qk_norm == "all" else spec.head_dim,)
    yield names.k_norm, (kv if spec.qk_norm == "all" else spec.head_dim,)
    yield names.o, (hidden, q)
    yield names.o_bias, (hidden,)


def _latent(names: LatentNames, spec: LatentAttention, hidden: int) -> Shapes:
    q, q_rank = spec.heads * (spec.nope_dim + spec.rope_dim), spec.q_rank or 0
    kv, kv_a = spec.heads * (spec.nope_dim + spec.v_dim), spec.kv_rank + spec.rope_dim
    yield names.q, (q, hidden)
    yield names.q_a, (q_rank, hidden)
    yield names.q_a_bias, (q_rank,)
    yield names.q_a_norm, (q_rank,)
    yield names.q_b, (q, q_rank)
    yield names.kv_a, (kv_a, hidden)
    yield names.kv_a_bias, (kv_a,)
    yield names.kv_a_norm, (spec.kv_rank,)
    yield names.kv_b, (kv, spec.kv_rank)
    yield names.o, (hidden, spec.heads * spec.v_dim)
    yield names.o_bias, (hidden,)


def _moe(names: MoeNames, spec: MoeFfn, hidden: int) -> Shapes:
    yield names.router, (spec.experts, hidden)
    yield names.router_bias, (spec.experts,)
    for expert in range(spec.experts):
        yield from _swiglu(names.expert(expert), spec.width, hidden)
    if names.shared:
        yield from _swiglu(names.shared, spec.shared_width, hidden)


def _swiglu(names: DenseNames, width: int, hidden: int) -> Shapes:
    yield names.gate, (width, hidden)
    yield names.up, (width, hidden)
    yield names.gate_bias, (width,)
    yield names.up_bias, (width,)
    yield names.down, (hidden, width)
    yield names.down_bias, (hidden,)
