"""OLMoE."""

from __future__ import annotations

from trifold.shared.model.families.family import Family
from trifold.shared.model.spec import Attention, MoeFfn


class Olmoe(Family):
    """model_type olmoe: queries and keys are normed over all heads at once, then clipped."""

    def attention(self) -> Attention:
        if self.head_dim() * self.heads != self.hidden:
            raise self.unsupported(f"{self.heads} heads of {self.head_dim()} with hidden size {self.hidden}")
        clip = self.config.number("clip_qkv", above=0) if self.config.has("clip_qkv") else None
        return super().attention().model_copy(update={"qk_norm": "all", "clip": clip})

    def ffn(self, index: int) -> MoeFfn:
        return self.check(
            MoeFfn(
                experts=self.config.integer("num_experts"),
                top_k=self.config.integer("num_experts_per_tok"),
                width=self.config.integer("intermediate_size"),
                normalize=self.config.flag("norm_topk_prob", False),
            )
        )
