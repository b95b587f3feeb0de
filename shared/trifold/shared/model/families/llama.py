"""Llama, in all its versions up to 3.3."""

from __future__ import annotations

from trifold.shared.model.families.family import Family
from trifold.shared.model.spec import DenseFfn


class Llama(Family):
    """model_type llama."""

    def ffn(self, index: int) -> DenseFfn:
        bias = self.config.flag("mlp_bias", False)
        return self.dense().model_copy(update={"bias": bias})
