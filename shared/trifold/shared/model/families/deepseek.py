"""DeepSeek-V2 and V3: latent attention, a few dense layers, then experts with shared ones beside them."""

from __future__ import annotations

from abc import abstractmethod

from trifold.shared.errors import DamagedFile
from trifold.shared.model.families.family import MOST_HEAD_DIM, Family
from trifold.shared.model.names import Layout
from trifold.shared.model.spec import DenseFfn, LatentAttention, MoeFfn


class DeepSeek(Family):
    """What both generations share."""

    def attention(self) -> LatentAttention:
        if self.kv_heads != self.heads:
            raise self.unsupported(f"latent attention with {self.heads} heads, {self.kv_heads} of key-value")
        if "q_lora_rank" not in self.config.values:  # null says that queries are not compressed
            raise DamagedFile(f"{self.config.source}: q_lora_rank is missing")
        nope, rope = self.config.integer("qk_nope_head_dim"), self.rotated()
        return LatentAttention(
            heads=self.heads,
            q_rank=self.config.integer("q_lora_rank") if self.config.has("q_lora_rank") else None,
            kv_rank=self.config.integer("kv_lora_rank"),
            nope_dim=nope,
            rope_dim=rope,
            v_dim=self.config.integer("v_head_dim"),
            softmax_scale=(nope + rope) ** -0.5 * self.rope.softmax_gain(),
            bias=self.config.flag("attention_bias", False),
        )

    def rotated(self) -> int:
        return self.config.integer("qk_rope_head_dim", most=MOST_HEAD_DIM)

    def layout(self) -> Layout:
        return Layout(rope_interleaved=True)

    def ffn(self, index: int) -> DenseFfn | MoeFfn:
        # transformers knows no moe_layer_freq; DeepSeek's own modeling code does and is followed.
        every = self.config.integer("moe_layer_freq", 1)
        first = self.config.integer("first_k_dense_replace", least=0)
        return self.check(self.moe()) if index >= first and index % every == 0 else self.dense()

    @abstractmethod
    def moe(self) -> MoeFfn:
        """The experts of a layer that has them."""

    def shared_width(self) -> int:
        """The shared experts are stored as one, as wide as all of them."""
        experts = self.config.integer("n_shared_experts", 0, least=0)
        return experts * self.config.integer("moe_intermediate_size")


class DeepSeekV3(DeepSeek):
    """model_type deepseek_v3: sigmoid scores, balanced by a correction bias ("noaux_tc")."""

    def layout(self) -> Layout:
        return Layout(rope_interleaved=self.config.flag("rope_interleave", True))

    def moe(self) -> MoeFfn:
        self.config.expect("topk_method", "noaux_tc")
        self.config.expect("scoring_func", "sigmoid")
        return MoeFfn(
            experts=self.config.integer("n_routed_experts"),
            top_k=self.config.integer("num_experts_per_tok"),
            width=self.config.integer("moe_intermediate_size"),
            shared_width=self.shared_width(),
            scoring="sigmoid",
            groups=self.config.integer("n_group"),
            top_groups=self.config.integer("topk_group"),
            group_score="top2",
            correction_bias=True,
            normalize=self.config.flag("norm_topk_prob", True),
            routed_scale=self.config.number("routed_scaling_factor"),
        )


class DeepSeekV2(DeepSeek):
    """model_type deepseek_v2: softmax scores, never normalized."""

    def moe(self) -> MoeFfn:
        self.config.expect("topk_method", "greedy", "group_limited_greedy")
        self.config.expect("scoring_func", "softmax")
        # transformers leaves out this normalization, DeepSeek's own code then leaves out the
        # routed_scaling_factor: there is no agreed meaning, and no published model asks for it.
        self.config.expect("norm_topk_prob", False)
        self.config.expect("mlp_bias", False)
        limited = self.config.text("topk_method", "greedy") == "group_limited_greedy"
        return MoeFfn(
            experts=self.config.integer("n_routed_experts"),
            top_k=self.config.integer("num_experts_per_tok"),
            width=self.config.integer("moe_intermediate_size"),
            shared_width=self.shared_width(),
            groups=self.config.integer("n_group") if limited else 1,
            top_groups=self.config.integer("topk_group") if limited else 1,
            normalize=False,
            routed_scale=self.config.number("routed_scaling_factor", 1.0),
        )
