"""LoRA factors and their file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from trifold.shared.bundle.factors import Float, LoraFactors
from trifold.shared.errors import DamagedFile, InvalidRequest

RNG = np.random.default_rng(0)
A, B = "model.layers.0.self_attn.o_proj.lora_A", "model.layers.0.self_attn.o_proj.lora_B"
WEIGHT = "model.layers.0.self_attn.o_proj.weight"


def tensors() -> dict[str, Float]:
    return {A: RNG.standard_normal((4, 12), np.float32), B: RNG.standard_normal((10, 4), np.float32)}


def test_the_file_is_one_of_safetensors_own_and_equal_factors_have_one_digest(tmp_path: Path) -> None:
    given = tensors()
    save_file(given, tmp_path / "theirs", metadata={"alpha": "16", "rank": "4"})
    loaded = LoraFactors.load(tmp_path / "theirs")
    assert (loaded.alpha, loaded.rank) == (16.0, 4)
    assert all(np.array_equal(loaded.tensors[name], given[name]) for name in (A, B))
    again = LoraFactors(dict(reversed(given.items())), 16, 4)
    assert loaded.digest() == again.digest() == LoraFactors(given, 16.0, 4).digest()


def test_rows_are_merged_alike_however_they_are_read() -> None:
    factors = LoraFactors(tensors(), 6.0, 4)
    weight = RNG.standard_normal((10, 12), np.float32)
    whole = factors.merged(WEIGHT, weight)
    wanted = weight + 1.5 * factors.tensors[B].astype(np.float64) @ factors.tensors[A]
    assert np.allclose(whole, wanted, rtol=1e-6)
    assert not np.array_equal(whole, weight)
    parts = [factors.merged(WEIGHT, weight[start : start + 3], start) for start in range(0, 10, 3)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert factors.merged("model.norm.weight", weight) is weight
    assert factors.shapes() == {WEIGHT: (10, 12)}


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({A: None}, "lora_B has no counterpart lora_A"),
        ({B: None}, "lora_A has no counterpart lora_B"),
        ({A: np.zeros((5, 12), np.float32)}, "lora_A is float32 .* not fp32 of rank 4"),
        ({B: np.zeros((4, 10), np.float32)}, "lora_B is float32 .* not fp32 of rank 4"),
        ({B: np.zeros((10, 4))}, "lora_B is float64"),
        ({B: np.full((10, 4), np.nan, np.float32)}, "lora_B holds values that are not finite"),
        ({A: np.full((4, 12), -np.inf, np.float32)}, "lora_A holds values that are not finite"),
        ({"model.norm.weight": np.zeros((4, 4), np.float32)}, "neither a projection's lora_A nor its lora_B"),
        ({A: None, B: None}, "0 tensors"),
    ],
)
def test_what_are_no_factors_is_refused_by_name(change: dict[str, Float | None], hint: str) -> None:
    given = {name: values for name, values in {**tensors(), **change}.items() if values is not None}
    with pytest.raises(InvalidRequest, match=hint):
        LoraFactors(given, 8.0, 4)


@pytest.mark.parametrize(
    ("metadata", "hint"),
    [
        (None, "must give alpha and rank"),
        ({"alpha": "8"}, "must give alpha and rank"),
        ({"alpha": "eight", "rank": "4"}, "must give alpha and rank"),
        ({"alpha": "nan", "rank": "4"}, "no LoRA factors"),
        ({"alpha": "8", "rank": "3"}, "not fp32 of rank 3"),
    ],
)
def test_a_file_that_does_not_say_how_it_is_scaled_is_refused(
    tmp_path: Path, metadata: dict[str, str] | None, hint: str
) -> None:
    save_file(tensors(), tmp_path / "factors", metadata=metadata)
    with pytest.raises(InvalidRequest, match=f"factors: .*{hint}"):
        LoraFactors.load(tmp_path / "factors")


def test_a_file_that_is_cut_short_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "factors", metadata={"alpha": "8", "rank": "4"})
    data = (tmp_path / "factors").read_bytes()
    (tmp_path / "factors").write_bytes(data[:-1])
    with pytest.raises(DamagedFile, match="cut short"):
        LoraFactors.load(tmp_path / "factors")
    save_file({A: np.zeros((4, 12), np.int64)}, tmp_path / "integers")
    with pytest.raises(InvalidRequest, match="no LoRA factor"):
        LoraFactors.load(tmp_path / "integers")
