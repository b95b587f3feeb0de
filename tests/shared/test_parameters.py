"""Parameter counts against what is published, from the published configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

from tests.checkpoints import SMALL, save_random
from tests.published import DEEPSEEK_V3, LLAMA_3_1_8B, MIXTRAL_8X7B, OLMOE_7B, QWEN3_30B_A3B
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.model.families.registry import family_of
from trifold.shared.model.fields import Fields
from trifold.shared.model.parameters import of_model
from trifold.shared.model.shapes import tensor_shapes

PUBLISHED: Final = {
    "DeepSeek-V3": (DEEPSEEK_V3, 671.0, 37.0),
    "Mixtral-8x7B": (MIXTRAL_8X7B, 46.7, 12.9),
    "Qwen3-30B-A3B": (QWEN3_30B_A3B, 30.5, 3.3),
    "OLMoE-1B-7B": (OLMOE_7B, 6.9, 1.3),
    "Llama-3.1-8B": (LLAMA_3_1_8B, 8.03, 8.03),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_parameters_of_a_published_config_are_those_of_its_model_card(model: str) -> None:
    config, total, active = PUBLISHED[model]
    parameters = of_model(family_of(Fields(config)).spec())
    assert parameters.total / 1e9 == pytest.approx(total, abs=0.06)
    # Model cards round, and some leave the embedding out: DeepSeek says 37 where it is 37.55.
    assert parameters.active / 1e9 == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize("family", SMALL)
def test_the_parameters_of_a_checkpoint_are_the_values_in_its_files(family: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"tie_word_embeddings": family == "llama"}
    if family not in ("mixtral", "olmoe"):
        changes["attention_bias"] = True
    checkpoint = Checkpoint.open(save_random(family, tmp_path, **changes))
    stored = sum(checkpoint.read(name).size for name in tensor_shapes(checkpoint.names))
    assert of_model(checkpoint.spec).total == stored
