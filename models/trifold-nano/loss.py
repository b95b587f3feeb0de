"""Cross entropy of the output head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class HeadLoss(torch.autograd.Function):
    """Summed cross entropy of the head, with the gradients made in the forward pass.

    The logits and their softmax exist for one chunk of tokens at a time and are read while in cache.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        """hidden [N, D], weight [V, D] fp32, labels [N] -> scalar fp32."""
        matrix = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(labels), chunk):
            rows, wanted = hidden[start : start + chunk], labels[start : start + chunk, None]
            share = functional.linear(rows, matrix).float().softmax(-1)
            total -= share.gather(1, wanted).clamp_min(1e-30).log().sum()
            if ctx.needs_input_grad[0]:
                error = share.scatter_add_(1, wanted, -torch.ones_like(share[:, :1])).to(rows.dtype)
                torch.mm(error, matrix, out=grad_hidden[start : start + chunk])
                grad_weight += error.t() @ rows
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0].to(grad_hidden.dtype), grad_weight * grads[0], None, None
