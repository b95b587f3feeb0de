"""Weights of latent attention, multiplied when the model is split, so that attention runs over the latent.

With l the latent of a position, a head's key is U l and its value V l. So q · (U l) = (Uᵀ q) · l, and
O Σ p (V l) = (O V) Σ p l: queries can be taken to the latent and outputs back from it, and a cache holds one
latent for all heads (DeepSeek-V2, arXiv 2405.04434, section 2.1.2). Products are rounded to fp32 once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from trifold.cloud.split.graph.matrix import PIECE, Float, Matrix, Source, reorder
from trifold.shared.model.heads import HeadLayout, Order
from trifold.shared.model.spec import LatentAttention


def absorbed_queries(
    source: Source, query: str, expansion: str, spec: LatentAttention, turned: Order
) -> Matrix:
    """(heads · size, inputs): of each head the rotated rows as in `turned`, then Uᵀ times the plain ones."""
    layout = HeadLayout.of(spec)
    inputs = source.checkpoint.shape(query)[1]

    def head(index: int) -> Float:
        first = index * (spec.nope_dim + spec.rope_dim)
        rows = source.rows(query, first, first + spec.nope_dim + spec.rope_dim)
        first = index * (spec.nope_dim + spec.v_dim)
        keys = source.rows(expansion, first, first + spec.nope_dim).astype(np.float64)
        out = np.zeros((layout.size, inputs), np.float32)
        out[: len(turned)] = reorder(rows[spec.nope_dim :], turned)
        out[len(turned) : len(turned) + spec.kv_rank] = keys.T @ rows[: spec.nope_dim]
        return out

    return Matrix(spec.heads * layout.size, inputs, lambda: map(head, range(spec.heads)))


def absorbed_output(source: Source, output: str, expansion: str, spec: LatentAttention) -> Matrix:
    """(hidden, heads · kv_rank): O V of each head."""
    hidden = source.checkpoint.shape(output)[0]
    step = max(1, PIECE // (spec.heads * max(spec.v_dim, spec.kv_rank)))

    def values(index: int) -> Float:
        first = index * (spec.nope_dim + spec.v_dim) + spec.nope_dim
        return source.rows(expansion, first, first + spec.v_dim)

    def pieces() -> Iterator[Float]:
        heads = np.stack([values(index) for index in range(spec.heads)]).astype(np.float64)
        for start in range(0, hidden, step):
            rows = source.rows(output, start, min(start + step, hidden))
            by_head = rows.reshape(len(rows), spec.heads, spec.v_dim).swapaxes(0, 1)
            yield (by_head @ heads).swapaxes(0, 1).reshape(len(rows), -1).astype(np.float32)

    return Matrix(hidden, spec.heads * spec.kv_rank, pieces)
