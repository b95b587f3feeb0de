"""The router: which experts a row goes to, with what weight. Of equal scores the lower number wins."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from trifold.shared.model.spec import MoeFfn

_NEVER: Final = 1e30
"""What makes a score lower than any other."""


def route(logits: Tensor, bias: Tensor | None, spec: MoeFfn) -> tuple[Tensor, Tensor]:
    """The chosen experts (rows, top_k), best first, and their weights, by logits (rows, experts).

    `bias` is added to the scores for the choice alone.
    """
    # Not torch.sigmoid: trifold.cloud.core.engines.torch.tiling says why.
    scores = 1 / (1 + torch.exp(-logits)) if spec.scoring == "sigmoid" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    if spec.groups > 1:
        choice = _within_best_groups(choice, spec)
    experts = _best(choice, spec.top_k)
    weights = scores.gather(-1, experts)
    if spec.normalize:
        total = weights[:, :1]
        for column in range(1, spec.top_k):
            total = total + weights[:, column : column + 1]
        weights = weights / total
    return experts, weights * spec.routed_scale


def _best(scores: Tensor, count: int) -> Tensor:
    """Where the largest are: (rows, count)."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count]


def _within_best_groups(choice: Tensor, spec: MoeFfn) -> Tensor:
    """`choice` lowered by _NEVER outside the `top_groups` best groups."""
    grouped = choice.unflatten(-1, (spec.groups, -1))  # type: ignore[no-untyped-call]
    if spec.group_score == "max":
        score = grouped.amax(-1)
    else:
        best = grouped.sort(-1, descending=True).values
        score = best[..., 0] + best[..., 1]
    outside = torch.full_like(score, -_NEVER).scatter(-1, _best(score, spec.top_groups), 0.0)
    return torch.flatten(grouped + outside[..., None], -2)
