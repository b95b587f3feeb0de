"""Qwen3, dense and mixture of experts."""

from __future__ import annotations

from typing import ClassVar

from trifold.shared.model.families.family import Family
from trifold.shared.model.spec import Attention, DenseFfn, Ffn, MoeFfn


class Qwen3(Family):
    """model_type qwen3: Llama with a norm on each query and key head."""

    default_head_dim: ClassVar[int | None] = 128
    slides_by_default = False

    def attention(self) -> Attention:
        return super().attention().model_copy(update={"qk_norm": "head"})

    def head_dim(self) -> int:
        if self.default_head_dim and not self.config.has("head_dim"):
            return self.default_head_dim
        return super().head_dim()

    def ffn(self, index: int) -> Ffn:
        return self.dense()


class Qwen3Moe(Qwen3):
    """model_type qwen3_moe: a layer has experts unless `mlp_only_layers` or `decoder_sparse_step` says no."""

    default_head_dim = None

    def ffn(self, index: int) -> DenseFfn | MoeFfn:
        every = self.config.integer("decoder_sparse_step", 1)
        if index in self.config.integers("mlp_only_layers") or (index + 1) % every:
            return self.dense()
        # transformers 5 writes the one, the Hub the other.
        experts = "num_local_experts" if self.config.has("num_local_experts") else "num_experts"
        return self.check(
            MoeFfn(
                experts=self.config.integer(experts),
                top_k=self.config.integer("num_experts_per_tok"),
                width=self.config.integer("moe_intermediate_size"),
                normalize=self.config.flag("norm_topk_prob", False),
            )
        )
