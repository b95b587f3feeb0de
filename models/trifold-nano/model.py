"""Compact torch form of DeepSeek-V3 for training on a CPU.

Parameter names are those of transformers' ``DeepseekV3ForCausalLM`` in memory (experts stacked), so a
state dict moves between the two without renaming.  Shapes: B batch, T time, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from attention import Attention
from config import Config
from loss import HeadLoss
from mixture import MoE
from parts import MLP, Linear, RMSNorm
from torch import Tensor, nn


class Layer(nn.Module):
    """Pre-norm block. [B, T, D] fp32 residual in, the same out; the branches run in ``dtype``."""

    def __init__(self, c: Config, index: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.self_attn = Attention(c)
        self.mlp = MLP(c.hidden_size, c.intermediate_size) if index < c.first_k_dense_replace else MoE(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x).to(self.dtype), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x).to(self.dtype))
        return out


class Body(nn.Module):
    """Embedding, layers and final norm: tokens [B, T] -> [B, T, D] in ``dtype``."""

    cos: Tensor
    sin: Tensor

    def __init__(self, c: Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, i, dtype) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        speed = c.rope_theta ** -(torch.arange(0, c.qk_rope_head_dim, 2) / c.qk_rope_head_dim)
        angle = torch.arange(c.max_position_embeddings)[:, None] * speed
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        time = tokens.shape[1]
        cos, sin = self.cos[:time].to(self.dtype), self.sin[:time].to(self.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.norm(x).to(self.dtype)
        return out


class Model(nn.Module):
    """The language model. Branches run in ``dtype`` (bf16 to train, fp32 to compare)."""

    def __init__(self, c: Config, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config = c
        self.model = Body(c, dtype)
        self.lm_head = Linear(c.hidden_size, c.vocab_size)

    def initialise(self) -> None:
        """Draw the weights; what writes into the residual stream starts at zero."""
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj", "lm_head.weight")):
                nn.init.zeros_(weight)
            elif weight.ndim > 1:
                nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> logits [B, T, V]."""
        logits: Tensor = self.lm_head(self.model(tokens))
        return logits

    def loss(self, tokens: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
        """Mean cross entropy of targets [B, T] after tokens [B, T]."""
        hidden, labels = self.model(tokens).flatten(0, 1), targets.flatten()
        total: Tensor = HeadLoss.apply(  # type: ignore[no-untyped-call]
            hidden, self.lm_head.weight, labels, chunk
        )
        return total / labels.numel()

    def routers(self) -> list[MoE]:
        """The mixture layers, in order."""
        return [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, MoE)]
