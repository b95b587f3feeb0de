"""ModelSpec: what a model is, whatever its family: enough to plan, build, check and describe its shards."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """A piece of a spec: immutable, comparable, and strict about what a file may say."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Rope(Part):
    """Rotary position embedding over `dim` values of a head, rotate-half order.

    `inverse_frequencies` (dim/2 values) and `scale` (which multiplies cos and sin) already contain whatever
    scaling (yarn, llama3, linear) the config asked for: nobody after the family adapter needs to know it.
    """

    dim: int
    kind: Literal["default", "linear", "yarn", "llama3"]
    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0


class GroupedAttention(Part):
    """Grouped-query attention; multi-head is kv_heads == heads.

    `qk_norm` is an RMSNorm on queries and keys before the rotation: over each head, or over all at once.
    `clip` bounds q, k and v to ±clip, after that norm and before the rotation (OLMoE's clip_qkv).
    """

    kind: Literal["grouped"] = "grouped"
    heads: int
    kv_heads: int
    head_dim: int
    softmax_scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["head", "all"] | None = None
    clip: float | None = None


class LatentAttention(Part):
    """Multi-head latent attention of DeepSeek-V2 and V3; `q_rank` is None where queries are not compressed.

    A head's query and key are `nope_dim` values without and `rope_dim` values with rotation. `norm_eps` is of
    the RMSNorms over the latents. `bias` is on q_a (where there is one), kv_a and the output projection.
    """

    kind: Literal["latent"] = "latent"
    heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    softmax_scale: float
    norm_eps: float = 1e-6
    bias: bool = False


Attention = Annotated[GroupedAttention | LatentAttention, Field(discriminator="kind")]


class DenseFfn(Part):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    kind: Literal["dense"] = "dense"
    width: int
    bias: bool = False


class MoeFfn(Part):
    """Routed SwiGLU experts, with a shared one of `shared_width` beside them when that is not 0.

    Scores are softmax or sigmoid of the router's logits. With `groups` > 1 only experts of the `top_groups`
    best groups can be chosen, a group being as good as its best expert ("max") or its two best ("top2").
    With `correction_bias` a bias is added to the scores for the choice alone (noaux_tc).
    The chosen scores are normalized to sum 1 when `normalize`, then multiplied by `routed_scale`.
    """

    kind: Literal["moe"] = "moe"
    experts: int
    top_k: int
    width: int
    shared_width: int = 0
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    correction_bias: bool = False
    normalize: bool = True
    routed_scale: float = 1.0


Ffn = Annotated[DenseFfn | MoeFfn, Field(discriminator="kind")]


class Layer(Part):
    """One pre-norm transformer layer."""

    attention: Attention
    ffn: Ffn


class ModelSpec(Part):
    """A decoder-only language model: embedding, layers, final RMSNorm, head.

    `family` is the model_type of the Hugging Face config. `stored` is the dtype of the checkpoint's weights.
    """

    family: str
    vocab: int
    hidden: int
    layers: tuple[Layer, ...]
    norm_eps: float
    rope: Rope
    tied_head: bool
    max_positions: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    stored: Literal["float32", "bfloat16", "float16", "float8_e4m3fn"]
