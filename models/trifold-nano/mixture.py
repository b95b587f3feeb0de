"""Mixture of experts: router, experts, and the balance between them.

Shapes: B batch, T time, N = B*T tokens, D hidden, I expert width, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from config import Config
from parts import MLP
from torch import Tensor, nn
from torch.nn import functional


class Gate(nn.Module):
    """Sigmoid router, limited to the best groups, balanced by a bias that only the choice sees."""

    e_score_correction_bias: Tensor

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.weight = nn.Parameter(torch.empty(c.n_routed_experts, c.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(c.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, D] -> weights [N, K] fp32, experts [N, K]."""
        c = self.c
        scores = functional.linear(x.float(), self.weight).sigmoid()
        with torch.no_grad():
            choice = scores + self.e_score_correction_bias
            grouped = choice.view(-1, c.n_group, c.n_routed_experts // c.n_group)
            best = grouped.topk(2, -1)[0].sum(-1).topk(c.topk_group, -1)[1]
            mask = torch.ones(grouped.shape[:2], dtype=torch.bool).scatter_(1, best, False)
            choice = grouped.masked_fill(mask[..., None], float("-inf")).view_as(choice)
            experts = choice.topk(c.num_experts_per_tok, -1)[1]
        weights = scores.gather(1, experts)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * c.routed_scaling_factor, experts


class Experts(nn.Module):
    """All routed experts of one layer, run on tokens sorted by expert."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        inner = c.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(c.n_routed_experts, 2 * inner, c.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(c.n_routed_experts, c.hidden_size, inner))

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, D], weights and experts [N, K] -> output [N, D], tokens per expert [E]."""
        count, per_token = experts.shape
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        load = torch.bincount(flat, minlength=self.down_proj.shape[0])
        hidden = grouped(x.index_select(0, order // per_token), self.gate_up_proj, load)
        gate, up = hidden.chunk(2, -1)
        rows = grouped(functional.silu(gate) * up, self.down_proj, load)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel()))
        rows = rows.index_select(0, back).view(count, per_token, -1)
        return torch.einsum("nkd,nk->nd", rows, weights.to(rows.dtype)), load


def grouped(x: Tensor, weight: Tensor, load: Tensor) -> Tensor:
    """Rows [M, in] sorted by expert times weights [E, out, in], load [E] rows each -> [M, out]."""
    offsets = load.cumsum(0).to(torch.int32)
    return functional.grouped_mm(x, weight.to(x.dtype).transpose(1, 2), offs=offsets)


class MoE(nn.Module):
    """Routed experts plus the shared expert. [B, T, D] -> [B, T, D]; keeps the last load for balancing."""

    load: Tensor

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate = Gate(c)
        self.experts = Experts(c)
        self.shared_experts = MLP(c.hidden_size, c.moe_intermediate_size * c.n_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        routed, self.load = self.experts(flat, *self.gate(flat))
        out: Tensor = routed.view_as(x) + self.shared_experts(x)
        return out

    @torch.no_grad()
    def balance(self, load: Tensor, rate: float) -> None:
        """Move the choice bias of every expert by ``rate`` against the sign of its load error. load [E]."""
        self.gate.e_score_correction_bias += rate * (load.mean() - load).sign()
