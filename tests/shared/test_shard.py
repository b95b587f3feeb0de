"""A shard gives a row the same bits, whatever comes with it in one call and whatever came before."""

from __future__ import annotations

import weakref
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.checkpoints import SMALL, save_random
from trifold.cloud.split.split import split
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import Cuts, Quantization, Tier
from trifold.shared.errors import InvalidRequest, OutOfSequence
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.model.heads import HeadLayout
from trifold.shared.runtime import shard as shard_module
from trifold.shared.runtime.shard import Rows, Shard

ROWS = 150

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in SMALL},
    # Heads wider than 128 values, experts and rows that are not whole blocks, heads that need blanks.
    "wide latent": ("deepseek_v3", {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}),
    "wide grouped": ("llama", {"head_dim": 160, "num_attention_heads": 2}),
    "odd latent": (
        "deepseek_v2",
        {"hidden_size": 100, "moe_intermediate_size": 40, "qk_nope_head_dim": 24, "qk_rope_head_dim": 20},
    ),
    "odd grouped": ("qwen3_moe", {"hidden_size": 80, "moe_intermediate_size": 24, "head_dim": 24}),
}

CASES = [(shape, quantization) for shape in SHAPES for quantization in ("int8", "int4", "none")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@cache
def bundle_of(shape: str, quantization: Quantization, folder: Path) -> Path:
    family, changes = SHAPES[shape]
    checkpoint = folder / shape
    if not checkpoint.exists():
        save_random(family, checkpoint, num_hidden_layers=3, **changes)
    out = folder / f"{shape} {quantization}"
    split(Checkpoint.open(checkpoint), Cuts(edge=0, cloud=2), out, quantization=quantization)
    return out


@cache
def load(shape: str, quantization: Quantization, folder: Path, tier: Tier, threads: int = 1) -> Shard:
    return Shard.load(TierFolder.open(bundle_of(shape, quantization, folder), tier), threads=threads)


@cache
def inputs() -> NDArray[np.float32]:
    rows = np.random.default_rng(1).standard_normal((ROWS, 128), np.float32)
    rows[3] *= 100
    return rows


@cache
def in_one_call(shard: Shard) -> Rows:
    return compute(shard, [0, ROWS])


def compute(shard: Shard, cuts: list[int], capacity: int = ROWS) -> Rows:
    """All rows, in one call from each cut to the next."""
    cache, rows = shard.cache(capacity), inputs()[:, : shard.hidden].copy()
    return np.concatenate([shard.run(cache, rows[start:end], start) for start, end in pairwise(cuts)])


chunkings = st.lists(st.integers(1, ROWS - 1), max_size=40).map(lambda cuts: sorted({0, *cuts, ROWS}))


@pytest.mark.parametrize(("shape", "quantization"), CASES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=chunkings, spare=st.integers(0, 200))
def test_every_chunking_gives_the_same_bits(
    folder: Path, shape: str, quantization: Quantization, cuts: list[int], spare: int
) -> None:
    shard = load(shape, quantization, folder, "cloud")
    assert np.array_equal(compute(shard, cuts, ROWS + spare), in_one_call(shard))


@pytest.mark.parametrize(("shape", "quantization"), CASES)
def test_row_after_row_gives_the_same_bits(folder: Path, shape: str, quantization: Quantization) -> None:
    shard = load(shape, quantization, folder, "cloud")
    assert np.array_equal(compute(shard, list(range(ROWS + 1))), in_one_call(shard))


@pytest.mark.parametrize(("shape", "quantization"), CASES)
def test_the_number_of_threads_changes_no_bit(folder: Path, shape: str, quantization: Quantization) -> None:
    one, two = (load(shape, quantization, folder, "cloud", threads) for threads in (1, 2))
    assert np.array_equal(in_one_call(one), in_one_call(two))


@pytest.mark.parametrize(("shape", "quantization"), CASES)
def test_the_self_test_finds_every_tier_exact(folder: Path, shape: str, quantization: Quantization) -> None:
    assert all(load(shape, quantization, folder, tier).exact for tier in ("cloud", "edge", "device"))


@pytest.mark.parametrize("shape", ["deepseek_v3", "llama", "wide latent"])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_positions_computed_again_get_their_first_bits(folder: Path, shape: str, data: st.DataObject) -> None:
    shard = load(shape, "int8", folder, "cloud")
    cache, rows = shard.cache(ROWS), inputs()[:, : shard.hidden].copy()
    shard.run(cache, rows, 0)
    for _ in range(3):
        base = data.draw(st.integers(0, ROWS - 1))
        others = data.draw(st.integers(1, ROWS - base))
        shard.run(cache, rows[::-1][:others].copy(), base)
        assert cache.have == base + others
        assert np.array_equal(shard.run(cache, rows[base:], base), in_one_call(shard)[base:])


def test_a_call_with_too_many_scores_is_cut_and_gives_the_same_bits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = load("deepseek_v3", "int8", folder, "cloud")
    whole = in_one_call(shard)
    monkeypatch.setattr(shard_module, "MOST_SCORES", 4 * 151 * 16)
    assert np.array_equal(compute(shard, [0, ROWS]), whole)


@pytest.mark.parametrize("most", [1, 7, 2**24])
def test_a_device_with_attention_gives_the_logits_that_are_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    shard = load("qwen3_moe", "int8", folder, "device")
    monkeypatch.setattr(shard_module, "MOST_SCORES", most * 4 * 31)
    rows = inputs()[:30, : shard.hidden].copy()
    everything = shard.run(shard.cache(30), rows, 0)
    assert everything.shape == (30, shard.vocab)
    for start in (0, 1, 29, 30):
        assert np.array_equal(shard.run(shard.cache(30), rows, 0, start), everything[start:])


def test_a_cache_has_what_was_run_and_no_gaps(folder: Path) -> None:
    shard = load("llama", "int8", folder, "cloud")
    cache, rows = shard.cache(20), inputs()[:, : shard.hidden].copy()
    assert cache.have == 0
    shard.run(cache, rows[:10], 0)
    assert cache.have == 10
    with pytest.raises(OutOfSequence, match="only 10 positions"):
        shard.run(cache, rows[:1], 11)
    shard.run(cache, rows[:2], 4)
    assert cache.have == 6
    with pytest.raises(InvalidRequest, match="positions 6 to 20 in a session of 20"):
        shard.run(cache, rows[:15], 6)
    assert cache.have == 6


def test_a_tier_without_layers_needs_no_memory_and_no_order(folder: Path) -> None:
    shard = load("llama", "int8", folder, "edge")
    assert not shard.attends
    assert shard.cache_bytes(1000) == 0
    tokens = np.array([1, 2, 300])
    late = shard.run(shard.cache(100), tokens, 90)
    assert np.array_equal(late, shard.run(shard.cache(100), tokens, 0))


def test_the_memory_of_a_cache_is_what_it_says(folder: Path) -> None:
    for shape in ("llama", "wide latent"):
        shard = load(shape, "int8", folder, "cloud")
        for capacity in (1, 100):
            values = shard.cache(capacity).bound
            size = sum(4 * np.prod(value.shape()) for name, value in values.items() if "past" in name)
            assert shard.cache_bytes(capacity) == size


def test_a_latent_is_kept_once_for_keys_and_values(folder: Path) -> None:
    shard = load("deepseek_v3", "int8", folder, "cloud")
    kept = [name.rpartition("_")[0] for name in shard.cache(10).bound if name.startswith("past")]
    assert set(kept) == {"past_latent"}
    layers = len(kept)
    size = HeadLayout.of(shard.spec.layers[-1].attention).size
    assert shard.cache_bytes(1001) - shard.cache_bytes(1000) == layers * 4 * size


def test_a_cache_that_nobody_holds_is_freed_at_once(folder: Path) -> None:
    shard = load("deepseek_v3", "int8", folder, "cloud")
    cache = shard.cache(100)
    for rows in (1, 5, 60):
        shard.run(cache, inputs()[:rows, : shard.hidden].copy(), 0)
    held = [weakref.ref(value) for name, value in cache.bound.items() if name.startswith("past")]
    del cache
    assert held
    assert all(value() is None for value in held)


@pytest.mark.parametrize(
    ("tier", "wrong"),
    [
        ("cloud", np.zeros((2, 64), np.float64)),
        ("cloud", np.zeros((2, 63), np.float32)),
        ("cloud", np.zeros((2, 64, 1), np.float32)),
        ("cloud", np.zeros((0, 64), np.float32)),
        ("edge", np.zeros(3, np.int32)),
        ("edge", np.zeros((3, 1), np.int64)),
        ("edge", np.array([0, 384])),
        ("edge", np.array([-1, 0])),
    ],
)
def test_inputs_that_cannot_be_are_refused(folder: Path, tier: Tier, wrong: NDArray[Any]) -> None:
    shard = load("llama", "int8", folder, tier)
    with pytest.raises(InvalidRequest):
        shard.run(shard.cache(10), wrong, 0)


def test_logits_from_a_position_outside_the_call_are_refused(folder: Path) -> None:
    shard = load("llama", "int8", folder, "device")
    for position in (-1, 5):
        with pytest.raises(InvalidRequest, match=f"logits from position {position}"):
            shard.run(shard.cache(10), inputs()[:4, :64].copy(), 0, position)
