"""The mean of LoRA adapters as what they are: products.

The mean of factors is not the mean of what they stand for: mean(B) mean(A) is not mean(B A). Here products
are averaged, and their mean is factored again to the same rank: the best adapter of that rank there is, by
the singular value decomposition (Eckart and Young 1936). FedEx-LoRA (arXiv 2410.09432) puts the rest into the
base weights, which are frozen here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from trifold.shared.federation.packing import Arrays

Matrix = NDArray[np.float32]

A, B = ".lora_A", ".lora_B"


def refactored_mean(before: Mapping[str, Matrix], sites: Sequence[Mapping[str, Matrix]]) -> Arrays:
    """The adapter whose products come nearest to the mean of the sites', in factors near those `before`."""
    result: Arrays = {}
    for name in sites[0]:
        if name.endswith(A):
            module = name.removesuffix(A)
            pairs = [(site[module + B], site[module + A]) for site in sites]
            result[module + B], result[module + A] = _refactored(before[name], pairs)
    return result


def _refactored(before: Matrix, pairs: Sequence[tuple[Matrix, Matrix]]) -> tuple[Matrix, Matrix]:
    """B (outputs, rank) and A (rank, inputs) for the mean of products; the products are never made.

    Of all the factors with the same product, these have rows of A as long as the sites' are: with AdamW that
    decides how fast B learns, and a direction that is not used yet (singular value 0) stays one that can be.
    And they are turned to where A was before (orthogonal Procrustes, Schönemann 1966), so that what error
    feedback holds back at the sites still means the same.
    """
    rank = len(before)
    tall = np.concatenate([b.astype(np.float64) for b, _ in pairs], 1) / len(pairs)
    wide = np.concatenate([a.astype(np.float64) for _, a in pairs], 0)
    left, upper = np.linalg.qr(tall)
    right, lower = np.linalg.qr(wide.T)
    u, singular, vt = np.linalg.svd(upper @ lower.T)
    # A projection with a side below the rank has no more directions than that.
    used = min(rank, len(singular))
    outputs = np.pad(left @ u[:, :used] * singular[:used], ((0, 0), (0, rank - used)))
    inputs = np.pad(vt[:used] @ right.T, ((0, rank - used), (0, 0)))
    p, _, qt = np.linalg.svd(before.astype(np.float64) @ inputs.T)
    turn = p @ qt
    length = np.sqrt(np.mean(np.square(np.linalg.norm(wide, axis=1))))
    return _float32(outputs @ turn.T / length), _float32(turn @ inputs * length)


def _float32(matrix: NDArray[np.float64]) -> Matrix:
    """In one order of bytes: another one would change the last bits of what is computed from it."""
    return np.ascontiguousarray(matrix, np.float32)
