"""Which family reads a config.json, by its model_type."""

from __future__ import annotations

from typing import Final

from trifold.shared.errors import UnsupportedModel
from trifold.shared.model.families.deepseek import DeepSeekV2, DeepSeekV3
from trifold.shared.model.families.family import Family
from trifold.shared.model.families.llama import Llama
from trifold.shared.model.families.mixtral import Mixtral
from trifold.shared.model.families.olmoe import Olmoe
from trifold.shared.model.families.qwen import Qwen3, Qwen3Moe
from trifold.shared.model.fields import Fields

FAMILIES: Final[dict[str, type[Family]]] = {
    "deepseek_v2": DeepSeekV2,
    "deepseek_v3": DeepSeekV3,
    "llama": Llama,
    "mixtral": Mixtral,
    "olmoe": Olmoe,
    "qwen3": Qwen3,
    "qwen3_moe": Qwen3Moe,
}


def family_of(config: Fields) -> Family:
    """The adapter for this config. Raises UnsupportedModel for a model_type that nobody reads."""
    kind = config.text("model_type")
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedModel(f"{config.source}: model_type {kind!r} is not supported, only {known}")
    return FAMILIES[kind](config)
