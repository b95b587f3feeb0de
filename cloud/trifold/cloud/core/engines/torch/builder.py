"""Builder: makes room on the device for every tensor of the core, and knows what goes where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from trifold.cloud.core.engines.torch.feedforward import Mixture, SwiGlu
from trifold.cloud.core.engines.torch.layers import Attention, Core, Grouped, Latent, Layer, Norm
from trifold.cloud.core.engines.torch.matrix import Matrix
from trifold.shared.model.names import DenseNames, GroupedNames, LatentNames, MoeNames, Names
from trifold.shared.model.spec import GroupedAttention, LatentAttention, MoeFfn
from trifold.shared.runtime.rotation import rotation
from trifold.shared.settings import WeightFormat

Put = Callable[[Tensor], object]


@dataclass(frozen=True)
class Source:
    """Rows of a fused matrix, by the names of weight and bias, in `order` if not in their own."""

    weight: str | None
    bias: str | None
    rows: int
    order: Tensor | None = None


class Builder:
    """`puts` has for each tensor of the checkpoint what takes it to its place."""

    def __init__(self, names: Names, weights: WeightFormat, device: torch.device) -> None:
        self.puts: dict[str, Put] = {}
        self._names = names
        self._spec = names.spec
        self._weights: WeightFormat = weights
        self._device = device
        self._compute = compute_dtype(weights, device)

    def core(self, span: range) -> Core:
        """These layers, to be filled by `puts`."""
        layers = [self._layer(index) for index in span]
        tables = rotation(self._spec.rope, self._spec.max_positions)
        half = self._spec.rope.dim // 2
        cos, sin = (torch.from_numpy(table[:, :half].copy()).to(self._device) for table in tables)
        return Core(layers, cos, sin)

    def _layer(self, index: int) -> Layer:
        layer, names = self._spec.layers[index], self._names.layer(index)
        attention: Attention
        match layer.attention, names.attention:
            case GroupedAttention() as grouped, GroupedNames() as grouped_names:
                attention = self._grouped(grouped, grouped_names)
            case LatentAttention() as latent, LatentNames() as latent_names:
                attention = self._latent(latent, latent_names)
        feed_forward: SwiGlu | Mixture
        match layer.ffn, names.ffn:
            case MoeFfn() as moe, MoeNames() as moe_names:
                feed_forward = self._mixture(moe, moe_names)
            case dense, DenseNames() as dense_names:
                feed_forward = self._swiglu(dense_names, dense.width)
        input_norm = self._norm(names.input_norm, self._spec.hidden)
        return Layer(input_norm, attention, self._norm(names.post_norm, self._spec.hidden), feed_forward)

    def _grouped(self, spec: GroupedAttention, names: GroupedNames) -> Grouped:
        queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        whole = spec.qk_norm == "all"
        return Grouped(
            spec,
            qkv=self._fused(
                Source(names.q, names.q_bias, queries),
                Source(names.k, names.k_bias, keys),
                Source(names.v, names.v_bias, keys),
            ),
            out=self._fused(Source(names.o, names.o_bias, self._spec.hidden), inputs=queries),
            q_norm=self._norm(names.q_norm, queries if whole else spec.head_dim) if names.q_norm else None,
            k_norm=self._norm(names.k_norm, keys if whole else spec.head_dim) if names.k_norm else None,
        )

    def _latent(self, spec: LatentAttention, names: LatentNames) -> Latent:
        head = spec.nope_dim + spec.rope_dim
        of_head = torch.cat([torch.arange(spec.nope_dim), spec.nope_dim + self._halves(spec.rope_dim)])
        of_heads = (torch.arange(spec.heads)[:, None] * head + of_head).flatten()
        keys = torch.cat([torch.arange(spec.kv_rank), spec.kv_rank + self._halves(spec.rope_dim)])
        q = Source(names.q, None, len(of_heads), of_heads)
        q_a = Source(names.q_a, names.q_a_bias, spec.q_rank or 0)
        q_b = Source(names.q_b, None, len(of_heads), of_heads)
        kv_a = Source(names.kv_a, names.kv_a_bias, len(keys), keys)
        to_latent = self._empty(spec.heads, spec.nope_dim, spec.kv_rank)
        from_latent = self._empty(spec.heads, spec.kv_rank, spec.v_dim)

        def expansion(values: Tensor) -> None:
            by_head = values.view(spec.heads, spec.nope_dim + spec.v_dim, spec.kv_rank)
            to_latent.copy_(by_head[:, : spec.nope_dim])
            from_latent.copy_(by_head[:, spec.nope_dim :].mT)

        self.puts[names.kv_b] = expansion
        return Latent(
            spec,
            start=self._fused(q if names.q else q_a, kv_a),
            q_norm=self._norm(names.q_a_norm, spec.q_rank or 0, spec.norm_eps) if names.q_a_norm else None,
            q_b=self._fused(q_b, inputs=spec.q_rank) if names.q_b else None,
            kv_norm=self._norm(names.kv_a_norm, spec.kv_rank, spec.norm_eps),
            to_latent=to_latent,
            from_latent=from_latent,
            out=self._fused(Source(names.o, names.o_bias, self._spec.hidden), inputs=spec.heads * spec.v_dim),
        )

    def _halves(self, count: int) -> Tensor:
        """Where rotated values come from: pairs of them may lie side by side in the checkpoint."""
        places = torch.arange(count)
        return torch.cat([places[0::2], places[1::2]]) if self._names.layout.rope_interleaved else places

    def _swiglu(self, names: DenseNames, width: int) -> SwiGlu:
        return SwiGlu(
            self._fused(Source(names.gate, names.gate_bias, width), Source(names.up, names.up_bias, width)),
            self._fused(Source(names.down, names.down_bias, self._spec.hidden), inputs=width),
        )

    def _mixture(self, spec: MoeFfn, names: MoeNames) -> Mixture:
        into = self._blank(spec.experts, 2 * spec.width, self._spec.hidden)
        out_of = self._blank(spec.experts, self._spec.hidden, spec.width)
        for expert in range(spec.experts):
            at = names.expert(expert)
            self.puts[at.gate] = self._into(into, expert, slice(0, spec.width))
            self.puts[at.up] = self._into(into, expert, slice(spec.width, 2 * spec.width))
            self.puts[at.down] = self._into(out_of, expert, slice(None))
        router = Matrix.blank(
            spec.experts, self._spec.hidden, weights="fp32", compute=torch.float32, device=self._device
        )
        self.puts[names.router] = self._into(router, slice(None))
        bias = torch.empty(spec.experts, device=self._device) if names.router_bias else None
        if names.router_bias and bias is not None:
            self.puts[names.router_bias] = bias.copy_
        shared = self._swiglu(names.shared, spec.shared_width) if names.shared else None
        return Mixture(spec, router, bias, into, out_of, shared)

    def _fused(self, *sources: Source, inputs: int | None = None) -> Matrix:
        """One matrix of several that take the same inputs, by default the hidden ones."""
        total = sum(source.rows for source in sources)
        biased = any(source.bias for source in sources)
        matrix = self._blank(total, inputs or self._spec.hidden, bias=biased)
        start = 0
        for source in sources:
            rows = slice(start, start + source.rows)
            start = rows.stop
            if source.weight:
                self.puts[source.weight] = self._into(matrix, rows, order=source.order)
            if source.bias and matrix.bias is not None:
                self.puts[source.bias] = _vector(matrix.bias[rows], source.order)
        return matrix

    def _into(self, matrix: Matrix, *place: int | slice, order: Tensor | None = None) -> Put:
        return lambda values: matrix.put(values if order is None else values[order], place)

    def _blank(self, *shape: int, bias: bool = False) -> Matrix:
        return Matrix.blank(
            *shape, weights=self._weights, compute=self._compute, device=self._device, bias=bias
        )

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._compute, device=self._device)

    def _norm(self, name: str, size: int, eps: float | None = None) -> Norm:
        gain = torch.empty(size, device=self._device)
        self.puts[name] = gain.copy_
        return Norm(gain, self._spec.norm_eps if eps is None else eps)


def _vector(place: Tensor, order: Tensor | None) -> Put:
    return lambda values: place.copy_(values if order is None else values[order])


COMPUTE: Final = {"bf16": torch.bfloat16, "fp32": torch.float32}


def compute_dtype(weights: WeightFormat, device: torch.device) -> torch.dtype:
    """What products are computed in, and keys and values kept in: of int8 weights fp32 on a CPU."""
    if weights == "int8":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return COMPUTE[weights]
