"""Training at a site: AdamW (arXiv 1711.05101) on the LoRA factors, a cosine schedule with warm-up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import cos, isfinite, pi
from typing import Literal

import torch
from torch import nn

from trifold.shared.errors import ConfigError, InvalidRequest
from trifold.shared.training.diverged import ADVICE, TrainingDiverged
from trifold.shared.training.site import SiteModel, Tokens

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    The learning rate climbs over the first `warmup` of `total_steps` steps, then falls along half a cosine to
    0. `offset` steps of these are done already, so that a round goes on where the last ended. Without
    `total_steps` this call's steps are the last.

    A step goes by the mean gradient of `accumulate` batches, cut to the norm `clip`. `proximal` is the mu of
    FedProx (arXiv 1812.06127): it pulls the factors to where this call found them. In "bf16" matrices are
    multiplied in bfloat16, while factors, their moments and the loss stay in fp32. With `checkpointing` the
    site's layers keep their inputs alone of each batch, for a third more computing and the same bits.
    """

    steps: int
    learning_rate: float = 1e-3
    total_steps: int | None = None
    offset: int = 0
    warmup: int = 0
    accumulate: int = 1
    weight_decay: float = 0.0
    clip: float = 1.0
    proximal: float = 0.0
    precision: Precision = "fp32"
    checkpointing: bool = False


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Of a step of this call, counted from 0."""
    total = settings.total_steps or settings.offset + settings.steps
    at = settings.offset + step
    if at < settings.warmup:
        return settings.learning_rate * (at + 1) / settings.warmup
    done = (at - settings.warmup) / max(1, total - settings.warmup)
    return settings.learning_rate * (1 + cos(pi * min(1.0, done))) / 2


def train(site: SiteModel, batches: Iterator[Tokens], settings: TrainSettings) -> list[float]:
    """Take `settings.steps` steps; returns the loss of each, in nats, as it was before the step.

    Raises TrainingDiverged when a loss, a gradient or a row is not finite, InvalidRequest when the batches
    run out, ConfigError when there is nothing to train.
    """
    optimizer, parameters = _adamw(site, settings), site.parameters()
    for shard in site.shards:
        shard.checkpointing = settings.checkpointing
    start = [parameter.detach().clone() for parameter in parameters]
    losses: list[float] = []
    for step in range(settings.steps):
        optimizer.zero_grad()
        losses.append(_accumulate(site, batches, settings))
        _pull(parameters, start, settings.proximal)
        _check(nn.utils.clip_grad_norm_(parameters, settings.clip).item(), "gradient's norm")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimizer.step()
    return losses


def evaluate(site: SiteModel, batches: Iterable[Tokens], precision: Precision = "fp32") -> float:
    """The mean cross entropy over all tokens of the batches, in nats. Raises InvalidRequest without any."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            labels = batch[:, 1:].size
            total += _loss(site, batch, precision).item() * labels
            tokens += labels
    if not tokens:
        raise InvalidRequest("no text to evaluate on: it is shorter than one sequence")
    return total / tokens


def _adamw(site: SiteModel, settings: TrainSettings) -> torch.optim.AdamW:
    """An optimizer without moments.

    Raises ConfigError when there is nothing to train.
    """
    parameters = site.parameters()
    if not parameters:
        raise ConfigError("nothing to train: no tier with LoRA has a layer; choose other tiers or other cuts")
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def _accumulate(site: SiteModel, batches: Iterator[Tokens], settings: TrainSettings) -> float:
    """Add up the gradient of a step; returns its loss."""
    total = 0.0
    for _ in range(settings.accumulate):
        if (tokens := next(batches, None)) is None:
            raise InvalidRequest("the text has fewer batches than the steps to take; repeat it or take fewer")
        loss = _loss(site, tokens, settings.precision) / settings.accumulate
        _check(loss.item(), "loss")
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def _loss(site: SiteModel, tokens: Tokens, precision: Precision) -> torch.Tensor:
    with torch.autocast(site.device.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return site.loss(tokens)


def _pull(parameters: list[nn.Parameter], start: list[torch.Tensor], proximal: float) -> None:
    """Add the gradient of proximal/2 * |w - start|^2."""
    for parameter, origin in zip(parameters, start, strict=True):
        if proximal and parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - origin, alpha=proximal)


def _check(value: float, what: str) -> None:
    if not isfinite(value):
        raise TrainingDiverged(f"the {what} is {value}: {ADVICE}")
