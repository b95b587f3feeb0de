"""Mixtral."""

from __future__ import annotations

from trifold.shared.model.families.family import Family
from trifold.shared.model.names import Layout
from trifold.shared.model.spec import MoeFfn


class Mixtral(Family):
    """model_type mixtral: every layer has experts, of the width `intermediate_size`."""

    default_theta = 1_000_000.0

    def ffn(self, index: int) -> MoeFfn:
        return self.check(
            MoeFfn(
                experts=self.config.integer("num_local_experts"),
                top_k=self.config.integer("num_experts_per_tok"),
                width=self.config.integer("intermediate_size"),
            )
        )

    def layout(self) -> Layout:
        return Layout(moe="block_sparse_moe", gate="w1", up="w3", down="w2")
