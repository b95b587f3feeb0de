"""How far a model's predictions are from those of a reference, counted over a text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


@dataclass
class Fidelity:
    """Sums over predicted tokens; natural logarithms throughout."""

    tokens: int = 0
    loss_sum: float = 0.0
    kl_sum: float = 0.0
    agreed: int = 0

    def add(self, logits: Logits, reference: Logits, targets: NDArray[np.int64]) -> None:
        """Counts predictions (n, vocab) against the reference's (n, vocab) and the tokens (n,) that came."""
        log_p, log_q = _log_softmax(reference), _log_softmax(logits)
        self.tokens += len(targets)
        self.loss_sum -= float(log_q[np.arange(len(targets)), targets].sum())
        self.kl_sum += float((np.exp(log_p) * (log_p - log_q)).sum())
        self.agreed += int((logits.argmax(axis=1) == reference.argmax(axis=1)).sum())

    @property
    def loss(self) -> float:
        """Mean cross entropy in nats per token."""
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def kl(self) -> float:
        """Mean KL divergence of the reference from this model, in nats per token."""
        return self.kl_sum / self.tokens

    @property
    def agreement(self) -> float:
        """Share of positions whose most probable token is the reference's."""
        return self.agreed / self.tokens


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted: NDArray[np.float64] = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
