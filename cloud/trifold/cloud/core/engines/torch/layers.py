"""The layers of the core, as spec and weights have them; all but weights and keys is fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from trifold.cloud.core.engines.torch.attention import Pages, attend
from trifold.cloud.core.engines.torch.feedforward import Mixture, SwiGlu
from trifold.cloud.core.engines.torch.matrix import Matrix
from trifold.cloud.core.engines.torch.places import Places
from trifold.cloud.core.engines.torch.tiling import Tiling
from trifold.shared.model.spec import GroupedAttention, LatentAttention


@dataclass(frozen=True)
class Turned:
    """cos and sin of a batch's rows (rows, half)."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x (rows, heads, 2 · half) rotated, first halves against second ones."""
        first, second = x.chunk(2, -1)
        cos, sin = self.cos[:, None], self.sin[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@dataclass(frozen=True)
class Norm:
    """RMSNorm over the last dimension."""

    gain: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.gain.shape, self.gain, self.eps)


class Attention(Protocol):
    """Attention of rows (rows, hidden) at `places`, whose keys and values it writes first."""

    def __call__(self, x: Tensor, pages: Pages, places: Places, turned: Turned, tiling: Tiling) -> Tensor: ...


@dataclass(frozen=True)
class Grouped:
    """Grouped-query attention; `qkv` is all three, one after the other."""

    spec: GroupedAttention
    qkv: Matrix
    out: Matrix
    q_norm: Norm | None
    k_norm: Norm | None

    def __call__(self, x: Tensor, pages: Pages, places: Places, turned: Turned, tiling: Tiling) -> Tensor:
        heads, keys, size = self.spec.heads, self.spec.kv_heads, self.spec.head_dim
        queries, key, value = self.qkv.product(x, tiling).split([heads * size, keys * size, keys * size], -1)  # type: ignore[no-untyped-call]
        queries, key = self._normed(queries, self.q_norm), self._normed(key, self.k_norm)
        if self.spec.clip is not None:
            queries, key, value = (
                part.clamp(-self.spec.clip, self.spec.clip) for part in (queries, key, value)
            )
        queries, key = turned(queries.view(-1, heads, size)), turned(key.view(-1, keys, size))
        pages.write(places, key, value.view(-1, keys, size))
        found = attend(queries, pages, places, self.spec.softmax_scale)
        return self.out.product(found.flatten(1), tiling)

    def _normed(self, x: Tensor, norm: Norm | None) -> Tensor:
        if norm is None:
            return x
        return norm(x.unflatten(-1, (-1, len(norm.gain)))).flatten(1)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Latent:
    """Latent attention over the latent: queries are taken to it, and outputs back from it.

    With l the latent of a position, a head's key is U l and its value V l; q · (U l) = (Uᵀ q) · l, and
    Σ p (V l) = V Σ p l (DeepSeek-V2, arXiv 2405.04434, section 2.1.2). So a position has kv_rank + rope_dim
    values. `start` gives queries, compressed where there is a `q_b`, then the latent, then the rotated key.
    """

    spec: LatentAttention
    start: Matrix
    q_norm: Norm | None
    q_b: Matrix | None
    kv_norm: Norm
    to_latent: Tensor
    """(heads, nope_dim, kv_rank)"""
    from_latent: Tensor
    """(heads, kv_rank, v_dim)"""
    out: Matrix

    def __call__(self, x: Tensor, pages: Pages, places: Places, turned: Turned, tiling: Tiling) -> Tensor:
        spec = self.spec
        whole = self.start.product(x, tiling)
        queries = whole[:, : -(spec.kv_rank + spec.rope_dim)]
        latent, key = whole[:, queries.shape[1] :].split([spec.kv_rank, spec.rope_dim], -1)  # type: ignore[no-untyped-call]
        if self.q_norm and self.q_b:
            queries = self.q_b.product(self.q_norm(queries), tiling)
        plain, rotated = queries.view(len(x), spec.heads, -1).split([spec.nope_dim, spec.rope_dim], -1)  # type: ignore[no-untyped-call]
        pages.write(places, torch.cat([self.kv_norm(latent)[:, None], turned(key[:, None])], -1), None)
        absorbed = torch.cat([self._by_head(plain, self.to_latent, tiling), turned(rotated)], -1)
        found = attend(absorbed, pages, places, spec.softmax_scale)
        return self.out.product(self._by_head(found, self.from_latent, tiling).flatten(1), tiling)

    @staticmethod
    def _by_head(x: Tensor, weight: Tensor, tiling: Tiling) -> Tensor:
        """x (rows, heads, inputs) times each head's own matrix (heads, inputs, outputs)."""
        heads = x.transpose(0, 1).to(weight.dtype)
        return tiling.over(heads, lambda tile: torch.bmm(tile, weight)).float().transpose(0, 1)


@dataclass(frozen=True)
class Layer:
    """One pre-norm layer, and its pages."""

    input_norm: Norm
    attention: Attention
    post_norm: Norm
    feed_forward: SwiGlu | Mixture


class Core:
    """The layers of the cloud. `cos` and `sin` (positions, half) are the rotation."""

    def __init__(self, layers: list[Layer], cos: Tensor, sin: Tensor) -> None:
        self.layers = layers
        self._cos = cos
        self._sin = sin

    def __call__(self, x: Tensor, pages: list[Pages], places: Places, tiling: Tiling) -> Tensor:
        """Rows x (rows, hidden) at `places`, behind the layers."""
        turned = Turned(self._cos[places.positions], self._sin[places.positions])
        for layer, page in zip(self.layers, pages, strict=True):
            x = x + layer.attention(layer.input_norm(x), page, places, turned, tiling)
            x = x + layer.feed_forward(layer.post_norm(x), tiling)
        return x
