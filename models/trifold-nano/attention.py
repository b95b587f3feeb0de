"""Multi-head latent attention.  B batch, T time, D hidden, R rotary width."""

from __future__ import annotations

import torch
from config import Config
from parts import Linear, RMSNorm
from torch import Tensor, nn


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs. [B, heads, T, R] with angles [T, R/2] -> [B, heads, T, R], halves apart."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, block: int = 256) -> Tensor:
    """Causal attention. q, k [M, T, Q], v [M, T, V] -> [M, T, V].

    Plain products over blocks of queries: forward and backward together were measured more than twice as fast
    as the CPU flash kernel of scaled_dot_product_attention at these sizes.
    """
    time, scale = q.shape[1], q.shape[2] ** -0.5
    keys = k.transpose(1, 2)
    mask = torch.full((time, time), float("-inf"), dtype=q.dtype).triu(1)
    parts = []
    for start in range(0, time, block):
        stop = min(start + block, time)
        scores = torch.baddbmm(mask[start:stop, :stop], q[:, start:stop], keys[:, :, :stop], alpha=scale)
        parts.append(scores.softmax(-1) @ v[:, :stop])
    return torch.cat(parts, 1)


class Attention(nn.Module):
    """Multi-head latent attention. [B, T, D] -> [B, T, D]."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.heads, self.nope, self.rope, self.value = (
            c.num_attention_heads,
            c.qk_nope_head_dim,
            c.qk_rope_head_dim,
            c.v_head_dim,
        )
        self.latent = c.kv_lora_rank
        # Transformers gives the two latent norms no eps of the config, so 1e-6 is fixed here as there.
        self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank)
        self.q_a_layernorm = RMSNorm(c.q_lora_rank, 1e-6)
        self.q_b_proj = Linear(c.q_lora_rank, self.heads * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.kv_lora_rank + self.rope)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, 1e-6)
        self.kv_b_proj = Linear(c.kv_lora_rank, self.heads * (self.nope + self.value))
        self.o_proj = Linear(self.heads * self.value, c.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, _ = x.shape
        width = self.nope + self.rope
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(batch, time, self.heads, width).transpose(1, 2)
        q_nope, q_rope = q.split((self.nope, self.rope), -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.latent, self.rope), -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent))
        kv = kv.view(batch, time, self.heads, self.nope + self.value).transpose(1, 2)
        k_nope, v = kv.split((self.nope, self.value), -1)
        k_rope = rotate(k_rope[:, None], cos, sin).expand(-1, self.heads, -1, -1)
        q = torch.cat((q_nope, rotate(q_rope, cos, sin)), -1)
        k = torch.cat((k_nope, k_rope), -1)
        out = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
        out = out.view(batch, self.heads, time, self.value).transpose(1, 2).reshape(batch, time, -1)
        projected: Tensor = self.o_proj(out)
        return projected
