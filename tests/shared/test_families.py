"""Reading configs: what each family means, and what is refused before any work."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints import SMALL
from tests.published import DEEPSEEK_V3, LLAMA_3_1_8B, MIXTRAL_8X7B, OLMOE_7B, QWEN3_30B_A3B
from trifold.shared.errors import DamagedFile, TrifoldError, UnsupportedModel
from trifold.shared.model.families.registry import FAMILIES, family_of
from trifold.shared.model.fields import Fields
from trifold.shared.model.spec import GroupedAttention, LatentAttention, ModelSpec, MoeFfn

PUBLISHED = [DEEPSEEK_V3, LLAMA_3_1_8B, MIXTRAL_8X7B, OLMOE_7B, QWEN3_30B_A3B]
QWEN3 = {**QWEN3_30B_A3B, "model_type": "qwen3"}
DEEPSEEK_V2 = {
    **DEEPSEEK_V3,
    "model_type": "deepseek_v2",
    "topk_method": "group_limited_greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "quantization_config": None,
}


def spec_of(config: dict[str, Any], **changes: Any) -> ModelSpec:
    return family_of(Fields({**config, **changes})).spec()


@pytest.mark.parametrize("family", SMALL)
def test_every_family_has_a_small_checkpoint_for_tests(family: str) -> None:
    assert family in FAMILIES
    assert len(SMALL) == len(FAMILIES)


@pytest.mark.parametrize(
    ("config", "changes", "named"),
    [
        (LLAMA_3_1_8B, {"model_type": "gpt2"}, "gpt2"),
        (LLAMA_3_1_8B, {"hidden_act": "gelu"}, "gelu"),
        (LLAMA_3_1_8B, {"sliding_window": 4096}, "sliding"),
        (LLAMA_3_1_8B, {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "longrope"),
        (LLAMA_3_1_8B, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        (LLAMA_3_1_8B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA_3_1_8B, {"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24]}}, "mrope"),
        (LLAMA_3_1_8B, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        (LLAMA_3_1_8B, {"quantization_config": {"quant_method": "awq"}}, "awq"),
        (LLAMA_3_1_8B, {"quantization_config": {"quant_method": "fp8"}}, "weight_block_size"),
        (LLAMA_3_1_8B, {"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
        (LLAMA_3_1_8B, {"torch_dtype": "int8"}, "int8"),
        (LLAMA_3_1_8B, {"num_key_value_heads": 5}, "5 key-value heads"),
        (LLAMA_3_1_8B, {"num_attention_heads": 24}, "24 heads"),
        (MIXTRAL_8X7B, {"sliding_window": 4096}, "sliding"),
        (QWEN3, {"use_sliding_window": True, "sliding_window": 4096}, "sliding"),
        (QWEN3, {"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        (QWEN3_30B_A3B, {"num_experts_per_tok": 129}, "129 experts"),
        (OLMOE_7B, {"head_dim": 64}, "64"),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func"),
        (DEEPSEEK_V3, {"topk_method": "greedy"}, "topk_method"),
        (DEEPSEEK_V3, {"n_group": 7}, "groups"),
        (DEEPSEEK_V3, {"num_key_value_heads": 8}, "key-value"),
        (DEEPSEEK_V2, {"norm_topk_prob": True}, "norm_topk_prob"),
        (DEEPSEEK_V2, {"scoring_func": "sigmoid"}, "scoring_func"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    config: dict[str, Any], changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        spec_of(config, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": None},
        {"hidden_size": "4096"},
        {"hidden_size": 0},
        {"num_hidden_layers": 10**9},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": -1},
        {"tie_word_embeddings": "yes"},
        {"eos_token_id": [-1]},
        {"model_type": None},
    ],
)
def test_a_config_that_makes_no_sense_is_refused_by_key(changes: dict[str, Any]) -> None:
    with pytest.raises(DamagedFile, match=next(iter(changes))):
        spec_of(LLAMA_3_1_8B, **changes)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (MIXTRAL_8X7B, {"sliding_window": 32768}),
        (QWEN3, {"sliding_window": 4096, "use_sliding_window": False}),
        (QWEN3, {"sliding_window": 4096, "use_sliding_window": None}),
        (QWEN3, {"layer_types": ["full_attention"] * 48}),
    ],
)
def test_a_sliding_window_that_is_not_in_use_is_no_obstacle(
    config: dict[str, Any], changes: dict[str, Any]
) -> None:
    assert spec_of(config, **changes)


def test_rope_is_the_same_in_the_words_of_transformers_4_and_5() -> None:
    scaling = LLAMA_3_1_8B["rope_scaling"]
    new = {"rope_scaling": None, "rope_theta": None, "rope_parameters": {**scaling, "rope_theta": 500000.0}}
    assert spec_of(LLAMA_3_1_8B, **new) == spec_of(LLAMA_3_1_8B)


def test_layers_of_qwen3_moe_are_dense_where_the_config_says_so() -> None:
    spec = spec_of(QWEN3_30B_A3B, num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    assert [layer.ffn.kind for layer in spec.layers] == ["dense", "moe", "dense", "dense", "dense", "moe"]


def test_layers_of_deepseek_are_dense_where_the_config_says_so() -> None:
    spec = spec_of(DEEPSEEK_V3, num_hidden_layers=7, first_k_dense_replace=2, moe_layer_freq=2)
    assert [layer.ffn.kind for layer in spec.layers] == [
        "dense",
        "dense",
        "moe",
        "dense",
        "moe",
        "dense",
        "moe",
    ]


def test_deepseek_v3_means_what_its_paper_says() -> None:
    spec = spec_of(DEEPSEEK_V3)
    attention, ffn = spec.layers[-1].attention, spec.layers[-1].ffn
    assert isinstance(attention, LatentAttention)
    assert isinstance(ffn, MoeFfn)
    assert (ffn.groups, ffn.top_groups, ffn.group_score, ffn.scoring) == (8, 4, "top2", "sigmoid")
    assert ffn.correction_bias
    # mscale_all_dim 1, factor 40: (0.1 ln 40 + 1)² / sqrt(192)
    assert attention.softmax_scale == pytest.approx(1.36888794**2 / 192**0.5)
    assert spec.rope.scale == 1.0


def test_olmoe_clips_and_norms_over_all_heads() -> None:
    attention = spec_of(OLMOE_7B, clip_qkv=8.0).layers[0].attention
    assert isinstance(attention, GroupedAttention)
    assert (attention.qk_norm, attention.clip) == ("all", 8.0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 2048},
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "mscale": 0.707,
            "mscale_all_dim": 1.0,
            "beta_fast": 16,
            "beta_slow": 2,
            "original_max_position_embeddings": 4096,
        },
        {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 2.0,
            "attention_factor": 1.25,
            "original_max_position_embeddings": 32768,
        },
    ],
)
def test_rope_frequencies_are_those_of_transformers(rope: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=65536, rope_parameters=dict(rope)
    )
    reference = LlamaRotaryEmbedding(config)
    read = spec_of(json.loads(config.to_json_string()), model_type="llama").rope
    np.testing.assert_allclose(read.inverse_frequencies, reference.inv_freq.numpy(), rtol=2e-6)
    assert read.scale == pytest.approx(reference.attention_scaling)


ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.integers(), max_size=3)
    | st.dictionaries(
        st.sampled_from(["type", "factor", "quant_method", "x"]), st.floats() | st.text(max_size=3)
    )
)


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda config: config["model_type"])
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_wrong_value_of_any_key_never_ends_in_another_error(
    config: dict[str, Any], data: st.DataObject
) -> None:
    key = data.draw(st.sampled_from(sorted(config)))
    changed = {**config, "num_hidden_layers": 4, key: data.draw(ANYTHING)}
    with suppress(TrifoldError):
        spec_of(changed)


def test_a_rope_that_overflows_on_the_way_is_taken_without_a_warning_where_it_ends_finite() -> None:
    assert spec_of(LLAMA_3_1_8B, rope_theta=2.15e38)


@pytest.mark.parametrize("content", ["", "[1]", "{", "\x00", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused_by_name(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(DamagedFile, match=r"config\.json"):
        Fields.load(tmp_path)
