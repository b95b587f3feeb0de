"""Names: what the tensors of a ModelSpec are called in a Hugging Face checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from trifold.shared.model.spec import Attention, DenseFfn, Ffn, GroupedAttention, ModelSpec


@dataclass(frozen=True)
class Layout:
    """How a family writes what families write differently."""

    moe: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    rope_interleaved: bool = False
    """Rotated pairs lie side by side in the rows of q and k, where ModelSpec wants them half the rotated part
    apart: whoever builds a shard moves rows 0, 2, 4 … of that part in front of rows 1, 3, 5 …"""


@dataclass(frozen=True)
class GroupedNames:
    """Grouped-query attention; a name is None where the spec has no such tensor."""

    q: str
    k: str
    v: str
    o: str
    q_bias: str | None
    k_bias: str | None
    v_bias: str | None
    o_bias: str | None
    q_norm: str | None
    k_norm: str | None


@dataclass(frozen=True)
class LatentNames:
    """Latent attention: `q`, or `q_a`, `q_a_norm`, `q_b` where queries are compressed.

    kv_a gives kv_rank + rope_dim values; kv_b gives nope_dim + v_dim values for each head.
    """

    q: str | None
    q_a: str | None
    q_a_bias: str | None
    q_a_norm: str | None
    q_b: str | None
    kv_a: str
    kv_a_bias: str | None
    kv_a_norm: str
    kv_b: str
    o: str
    o_bias: str | None


@dataclass(frozen=True)
class DenseNames:
    """SwiGLU: the dense one of a layer, one expert, or the shared expert."""

    gate: str
    up: str
    down: str
    gate_bias: str | None = None
    up_bias: str | None = None
    down_bias: str | None = None


@dataclass(frozen=True)
class MoeNames:
    """`router_bias` is the correction bias, for the choice of experts alone."""

    router: str
    router_bias: str | None
    shared: DenseNames | None
    _prefix: str
    _layout: Layout

    def expert(self, index: int) -> DenseNames:
        prefix, layout = f"{self._prefix}.experts.{index}", self._layout
        gate, up, down = (f"{prefix}.{part}.weight" for part in (layout.gate, layout.up, layout.down))
        return DenseNames(gate, up, down)


@dataclass(frozen=True)
class LayerNames:
    """One layer."""

    input_norm: str
    post_norm: str
    attention: GroupedNames | LatentNames
    ffn: DenseNames | MoeNames


class Names:
    """The names of a whole model. With a tied head, `head` is the embedding."""

    embedding = "model.embed_tokens.weight"
    final_norm = "model.norm.weight"

    def __init__(self, spec: ModelSpec, layout: Layout) -> None:
        self.spec = spec
        self.layout = layout
        self.head = self.embedding if spec.tied_head else "lm_head.weight"

    def layer(self, index: int) -> LayerNames:
        prefix, layer = f"model.layers.{index}", self.spec.layers[index]
        return LayerNames(
            input_norm=f"{prefix}.input_layernorm.weight",
            post_norm=f"{prefix}.post_attention_layernorm.weight",
            attention=_attention(f"{prefix}.self_attn", layer.attention),
            ffn=_ffn(prefix, layer.ffn, self.layout),
        )


def _attention(prefix: str, spec: Attention) -> GroupedNames | LatentNames:
    def weight(part: str) -> str:
        return f"{prefix}.{part}.weight"

    def bias(part: str, there: bool) -> str | None:
        return f"{prefix}.{part}.bias" if there else None

    if isinstance(spec, GroupedAttention):
        return GroupedNames(
            q=weight("q_proj"),
            k=weight("k_proj"),
            v=weight("v_proj"),
            o=weight("o_proj"),
            q_bias=bias("q_proj", spec.qkv_bias),
            k_bias=bias("k_proj", spec.qkv_bias),
            v_bias=bias("v_proj", spec.qkv_bias),
            o_bias=bias("o_proj", spec.output_bias),
            q_norm=weight("q_norm") if spec.qk_norm else None,
            k_norm=weight("k_norm") if spec.qk_norm else None,
        )
    compressed = spec.q_rank is not None
    return LatentNames(
        q=None if compressed else weight("q_proj"),
        q_a=weight("q_a_proj") if compressed else None,
        q_a_bias=bias("q_a_proj", compressed and spec.bias),
        q_a_norm=weight("q_a_layernorm") if compressed else None,
        q_b=weight("q_b_proj") if compressed else None,
        kv_a=weight("kv_a_proj_with_mqa"),
        kv_a_bias=bias("kv_a_proj_with_mqa", spec.bias),
        kv_a_norm=weight("kv_a_layernorm"),
        kv_b=weight("kv_b_proj"),
        o=weight("o_proj"),
        o_bias=bias("o_proj", spec.bias),
    )


def _swiglu(prefix: str, bias: bool = False) -> DenseNames:
    weights = [f"{prefix}.{part}_proj.weight" for part in ("gate", "up", "down")]
    biases = [f"{prefix}.{part}_proj.bias" if bias else None for part in ("gate", "up", "down")]
    return DenseNames(*weights, *biases)


def _ffn(prefix: str, spec: Ffn, layout: Layout) -> DenseNames | MoeNames:
    if isinstance(spec, DenseFfn):
        return _swiglu(f"{prefix}.mlp", spec.bias)
    block = f"{prefix}.{layout.moe}"
    return MoeNames(
        router=f"{block}.gate.weight",
        router_bias=f"{block}.gate.e_score_correction_bias" if spec.correction_bias else None,
        shared=_swiglu(f"{block}.shared_experts") if spec.shared_width else None,
        _prefix=block,
        _layout=layout,
    )
