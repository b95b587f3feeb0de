"""Sampling: the token that follows, a pure function of logits, parameters, seed and position."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trifold.shared.errors import BadRows, InvalidRequest


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy, top_k 0 and top_p 1 are no limit.

    Raises InvalidRequest naming the parameter that is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise InvalidRequest(f"temperature is {self.temperature}: it must be 0 (greedy) or above")
        if not 0 <= self.top_k < 2**32:
            raise InvalidRequest(f"top_k is {self.top_k}: it must be 0 (no limit) or above")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequest(f"top_p is {self.top_p}: it must be above 0 and at most 1 (no limit)")
        if not 0 <= self.seed < 2**64:
            raise InvalidRequest(f"seed is {self.seed}: it must fit in 64 bits without a sign")


def pick(logits: NDArray[np.float32], sampling: Sampling, position: int) -> int:
    """The token at `position`: argmax(log p + Gumbel(seed, position, token)), p after the warpers.

    `logits` is (vocab,). The warpers are temperature, top-k and top-p, in this order; of equal tokens the
    lower id counts as the larger, so that exactly top_k remain and greedy is top_k=1.
    Adding Gumbel noise and taking the maximum draws from p exactly (Gumbel, 1954; Maddison et al., 2014),
    and needs no state: whoever knows the seed knows the token, whatever was drawn before.

    Raises BadRows when the logits are not numbers.
    """
    best = logits.max()
    if not np.isfinite(best):
        raise BadRows(f"the logits for position {position} are not finite: the shard or its input is damaged")
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    scores = logits.astype(np.float64)
    scores -= best
    with np.errstate(over="ignore"):  # next to temperature 0 all but the best are at -inf, as they should be
        scores /= sampling.temperature
    tokens = np.arange(len(scores))
    if 0 < sampling.top_k < len(tokens):
        tokens = tokens[_largest(scores, sampling.top_k)]
    if sampling.top_p < 1.0:
        tokens = tokens[_largest(scores[tokens], _nucleus(scores[tokens], sampling.top_p))]
    scores += _gumbel(sampling.seed, position, len(scores))
    return int(tokens[scores[tokens].argmax()])


@dataclass(frozen=True)
class Logprobs:
    """What the model itself, before the warpers, gave a token and the likeliest ones: ln p, best first."""

    token: float
    top: tuple[tuple[int, float], ...]


def logprobs(logits: NDArray[np.float32], token: int, top: int) -> Logprobs:
    """Of `token` and of the `top` likeliest tokens, as the softmax of the logits (vocab,) has it."""
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    likeliest = np.argsort(-scores, kind="stable")[:top]
    return Logprobs(float(scores[token]), tuple((int(i), float(scores[i])) for i in likeliest))


def _largest(scores: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Where the `count` largest stand, in ascending order."""
    border = np.partition(scores, len(scores) - count)[len(scores) - count]
    keep = scores > border
    ties = np.flatnonzero(scores == border)
    keep[ties[: count - np.count_nonzero(keep)]] = True
    return np.flatnonzero(keep)


def _nucleus(scores: NDArray[np.float64], top_p: float) -> int:
    """How many of the most probable tokens it takes to reach `top_p` (Holtzman et al., 2019)."""
    mass = np.cumsum(np.exp(np.sort(scores)[::-1]))
    return int(np.searchsorted(mass, top_p * mass[-1])) + 1


def _gumbel(seed: int, position: int, vocab: int) -> NDArray[np.float64]:
    """Standard Gumbel noise (vocab,) from the counter-based generator Philox4x64-10 (Salmon et al., 2011).

    The seed is the key and the position the counter's second word; the first word counts blocks of tokens.
    NumPy keeps the raw bits of its generators from version to version.
    """
    noise: NDArray[np.float64] = np.empty(vocab)
    bits = np.random.Philox(key=seed, counter=position << 64).random_raw(vocab)
    np.add(bits >> np.uint64(12), 0.5, out=noise)
    noise *= 2.0**-52  # uniform, never 0, never 1
    for _ in range(2):
        np.negative(np.log(noise, out=noise), out=noise)
    return noise
