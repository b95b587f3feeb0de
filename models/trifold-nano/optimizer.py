"""Muon for matrices and stacks of matrices, AdamW for the rest, over one set of masters in fp32."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalise(g: Tensor) -> Tensor:
    """Five quintic Newton-Schulz steps: singular values of each matrix of g [M, R, C] to about one."""
    tall = g.shape[-2] > g.shape[-1]
    x = (g.mT if tall else g).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised for each matrix; equal shapes share one batch of products.

    The step of a matrix [R, C] is scaled by sqrt(max(1, R / C)), decoupled weight decay by the rate.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float, decay: float) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(tuple(p.shape), []).append(p)
            for shape, same in shapes.items():
                self._update(group, same, max(1.0, shape[-2] / shape[-1]) ** 0.5)

    def _update(self, group: dict[str, float], params: list[nn.Parameter], scale: float) -> None:
        steps = []
        for p in params:
            assert p.grad is not None
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            buffer = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            steps.append(p.grad.lerp(buffer, group["momentum"]).reshape(-1, *p.shape[-2:]))
        updates = torch.split(orthogonalise(torch.cat(steps)), [len(s) for s in steps])
        for p, update in zip(params, updates, strict=True):
            p.mul_(1 - group["lr"] * group["decay"])
            p.add_(update.reshape(p.shape), alpha=-group["lr"] * scale)


def build(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon over the hidden matrices; AdamW over embedding, head, routers and norms. ``lr`` is Muon's."""
    hidden, tables, norms = [], [], []
    for name, p in model.named_parameters():
        if p.ndim < 2:
            norms.append(p)
        elif "embed_tokens" in name or "lm_head" in name or "gate.weight" in name:
            tables.append(p)
        else:
            hidden.append(p)
    groups = [
        {"params": tables, "lr": lr * 0.2, "weight_decay": 0.01},
        {"params": norms, "lr": lr * 0.1, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10, fused=True)
    return [Muon(hidden, lr=lr, momentum=0.95, decay=0.05), adam]
