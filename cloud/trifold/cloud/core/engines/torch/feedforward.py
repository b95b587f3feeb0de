"""The feed-forward part of a layer: SwiGLU, alone or as routed experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from trifold.cloud.core.engines.torch.matrix import Matrix
from trifold.cloud.core.engines.torch.router import route
from trifold.cloud.core.engines.torch.tiling import Tiling
from trifold.shared.model.spec import MoeFfn


def gated(both: Tensor) -> Tensor:
    """silu(gate) · up, of gate and up side by side. Not torch's silu: tiling.py says why."""
    gate, up = both.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


@dataclass(frozen=True)
class SwiGlu:
    """down(silu(gate(x)) · up(x)), with gate and up in one matrix."""

    into: Matrix
    out_of: Matrix

    def __call__(self, x: Tensor, tiling: Tiling) -> Tensor:
        return self.out_of.product(gated(self.into.product(x, tiling)), tiling)


@dataclass(frozen=True)
class Mixture:
    """Routed experts, and one that all rows share. `into` and `out_of` are stacks with a matrix for each."""

    spec: MoeFfn
    router: Matrix
    bias: Tensor | None
    into: Matrix
    out_of: Matrix
    shared: SwiGlu | None

    def __call__(self, x: Tensor, tiling: Tiling) -> Tensor:
        chosen, weights = route(self.router.product(x, tiling), self.bias, self.spec)
        flat = chosen.flatten()
        # Rows in order of their experts, so that each expert's lie together.
        order = flat.argsort(stable=True)
        rows, experts = x[order // self.spec.top_k], flat[order]
        out = torch.empty_like(rows)
        out[order] = self._grouped(rows, experts) if self._groups(x) else self._each(rows, experts, tiling)
        parts = out.view(len(x), self.spec.top_k, -1)
        routed = weights[:, :1] * parts[:, 0]
        for rank in range(1, self.spec.top_k):
            routed = routed + weights[:, rank : rank + 1] * parts[:, rank]
        return routed if self.shared is None else routed + self.shared(x, tiling)

    def _groups(self, x: Tensor) -> bool:
        """Whether torch's grouped product is to be used, which is for bf16 on CUDA."""
        return x.device.type == "cuda" and self.into.weight.dtype == torch.bfloat16

    def _grouped(self, rows: Tensor, experts: Tensor) -> Tensor:
        """Without waiting for the GPU to tell how many rows an expert has, as CUDA graphs want it."""
        numbers = torch.arange(self.spec.experts, device=rows.device)
        ends = torch.searchsorted(experts, numbers, right=True).to(torch.int32)
        both = grouped_mm(rows.to(torch.bfloat16), self.into.weight.mT, offs=ends)
        return grouped_mm(gated(both.float()).to(torch.bfloat16), self.out_of.weight.mT, offs=ends).float()

    def _each(self, rows: Tensor, experts: Tensor, tiling: Tiling) -> Tensor:
        """Expert by expert, those that have rows."""
        counts = torch.bincount(experts, minlength=self.spec.experts).tolist()
        pieces = rows.split(counts)  # type: ignore[no-untyped-call]
        out = [
            self.out_of.of(expert).product(gated(self.into.of(expert).product(piece, tiling)), tiling)
            for expert, piece in enumerate(pieces)
            if len(piece)
        ]
        return torch.cat(out)
