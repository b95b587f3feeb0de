"""Family: what the config adapters of all model families share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Final, Literal

from trifold.shared.errors import UnsupportedModel
from trifold.shared.model.fields import Fields
from trifold.shared.model.names import Layout
from trifold.shared.model.rope import RopeConfig
from trifold.shared.model.spec import Attention, DenseFfn, Ffn, GroupedAttention, Layer, ModelSpec, MoeFfn

# Bounds against a config that asks for more than any machine has; published models stay far below.
MOST_LAYERS: Final = 1_000
MOST_HEAD_DIM: Final = 65_536


class Family(ABC):
    """Reads the config.json of one model family, with the meaning that it has in transformers 5.23.

    Raises DamagedFile for a config that makes no sense, UnsupportedModel naming what Trifold does not do.
    """

    default_theta: ClassVar[float] = 10_000.0
    slides_by_default: ClassVar[bool] = True

    def __init__(self, config: Fields) -> None:
        self.config = config
        self.hidden = config.integer("hidden_size")
        self.heads = config.integer("num_attention_heads")
        self.kv_heads = config.integer("num_key_value_heads", self.heads)
        self.rope = RopeConfig.read(config, self.default_theta)

    @abstractmethod
    def ffn(self, index: int) -> Ffn:
        """The feed-forward part of layer `index`."""

    def attention(self) -> Attention:
        """The attention of every layer: as in Llama unless a family says otherwise."""
        if self.heads % self.kv_heads:
            raise self.unsupported(f"{self.heads} attention heads over {self.kv_heads} key-value heads")
        bias = self.config.flag("attention_bias", False)
        return GroupedAttention(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim(),
            softmax_scale=self.head_dim() ** -0.5,
            qkv_bias=bias,
            output_bias=bias,
        )

    def head_dim(self) -> int:
        if not self.config.has("head_dim") and self.hidden % self.heads:
            raise self.unsupported(f"hidden size {self.hidden} over {self.heads} heads without head_dim")
        return self.config.integer("head_dim", self.hidden // self.heads, most=MOST_HEAD_DIM)

    def rotated(self) -> int:
        """How many values of a head are rotated."""
        return self.head_dim()

    def layout(self) -> Layout:
        return Layout()

    def weight_block(self) -> tuple[int, int]:
        """Height and width of the blocks that share a scale in fp8 weights; (1, 1) without quantization."""
        quantization = self.config.section("quantization_config")
        if quantization is None:
            return 1, 1
        if quantization.text("quant_method", "unnamed") != "fp8":
            raise self.unsupported(f"quantization_config {quantization.values.get('quant_method')!r}")
        quantization.expect("fmt", "e4m3")
        quantization.expect("activation_scheme", "dynamic")
        match quantization.integers("weight_block_size"):
            case (height, width) if height and width:
                return height, width
        raise self.unsupported("fp8 without blocks (weight_block_size)")

    def spec(self) -> ModelSpec:
        self._refuse_what_is_unknown()
        layers = self.config.integer("num_hidden_layers", most=MOST_LAYERS)
        attention = self.attention()
        return ModelSpec(
            family=self.config.text("model_type"),
            vocab=self.config.integer("vocab_size"),
            hidden=self.hidden,
            layers=tuple(Layer(attention=attention, ffn=self.ffn(index)) for index in range(layers)),
            norm_eps=self.config.number("rms_norm_eps", above=0),
            rope=self.rope.rope(self.rotated()),
            tied_head=self.config.flag("tie_word_embeddings", False),
            max_positions=self.rope.max_positions,
            bos_id=next(iter(self.config.integers("bos_token_id")), None),
            eos_ids=self.config.integers("eos_token_id"),
            stored=self._stored(),
        )

    def dense(self) -> DenseFfn:
        return DenseFfn(width=self.config.integer("intermediate_size"))

    def check(self, moe: MoeFfn) -> MoeFfn:
        """`moe`, or UnsupportedModel when its numbers do not go together."""
        per_group, rest = divmod(moe.experts, moe.groups)
        if rest or moe.top_groups > moe.groups or (moe.group_score == "top2" and per_group < 2):
            raise self.unsupported(f"{moe.top_groups} of {moe.groups} groups of {moe.experts} experts")
        if moe.top_k > moe.top_groups * per_group:
            raise self.unsupported(f"{moe.top_k} experts chosen out of {moe.top_groups * per_group}")
        return moe

    def unsupported(self, what: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.config.source}: {what}: not supported")

    def _refuse_what_is_unknown(self) -> None:
        self.config.expect("hidden_act", "silu", "swish")
        if self._slides():
            raise self.unsupported("sliding-window attention")
        self.weight_block()

    def _slides(self) -> bool:
        """Whether a sliding window is really in use: shorter than the positions, and not switched off."""
        if self.config.has("layer_types"):
            return set(self.config.texts("layer_types")) != {"full_attention"}
        window = self.config.integer("sliding_window", self.rope.max_positions)
        in_use = self.config.flag("use_sliding_window", self.slides_by_default)
        return in_use and window < self.rope.max_positions

    def _stored(self) -> Literal["float32", "bfloat16", "float16", "float8_e4m3fn"]:
        if self.config.section("quantization_config"):
            return "float8_e4m3fn"
        match self.config.text("dtype", self.config.text("torch_dtype", "float32")):
            case "float32" | "bfloat16" | "float16" as dtype:
                return dtype
            case other:
                raise self.unsupported(f"weights of dtype {other}")
