"""The core's engine gives every row the bits of the shard, alone and in any company."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.shared.test_shard import SHAPES, bundle_of
from trifold.cloud.core.engines.engine import Part
from trifold.cloud.core.engines.onnxruntime import attention, engine
from trifold.cloud.core.engines.onnxruntime.cut import Attention
from trifold.cloud.core.engines.onnxruntime.engine import OnnxRuntimeEngine
from trifold.cloud.core.engines.onnxruntime.folded import Folded, Single, folded
from trifold.cloud.core.kv.blocks import BLOCK
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import Quantization
from trifold.shared.errors import InvalidRequest, OutOfSequence
from trifold.shared.runtime.shard import Rows, Shard

CAPACITY = 150
CASES = [(shape, "int8") for shape in SHAPES] + [("deepseek_v3", "none"), ("qwen3_moe", "int4")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@cache
def loaded(shape: str, quantization: Quantization, folder: Path) -> tuple[Shard, OnnxRuntimeEngine]:
    cloud = TierFolder.open(bundle_of(shape, quantization, folder), "cloud")
    return Shard.load(cloud, threads=1), OnnxRuntimeEngine.load(cloud, threads=1)


@cache
def text(hidden: int, seed: int) -> Rows:
    """The rows of one session."""
    return np.random.default_rng(seed).standard_normal((CAPACITY, hidden), np.float32)


@cache
def alone(shard: Shard, seed: int) -> Rows:
    """What the shard makes of them in one call."""
    return shard.run(shard.cache(CAPACITY), text(shard.hidden, seed), 0)


@pytest.mark.parametrize(("shape", "quantization"), CASES)
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=6), min_size=1, max_size=5))
def test_rows_in_any_company_have_the_bits_of_the_shard(
    shape: str, quantization: Quantization, folder: Path, sessions: list[list[int]]
) -> None:
    """Sessions of other lengths, each cut in its own way, one part of each in every batch."""
    shard, core = loaded(shape, quantization, folder)
    assert core.exact
    caches = [core.cache(CAPACITY) for _ in sessions]
    for turn in range(max(map(len, sessions))):
        going = [
            (number, sum(cuts[:turn]), cuts[turn])
            for number, cuts in enumerate(sessions)
            if turn < len(cuts) and sum(cuts[: turn + 1]) <= CAPACITY
        ]
        batch = [
            Part(caches[number], text(core.hidden, number)[start : start + size], start)
            for number, start, size in going
        ]
        for (number, start, size), rows in zip(going, core.run(batch) if batch else [], strict=True):
            assert np.array_equal(rows, alone(shard, number)[start : start + size])
            assert caches[number].have == start + size


def test_its_fingerprint_is_that_of_the_shard_since_its_bits_are(folder: Path) -> None:
    shard, core = loaded("deepseek_v3", "int8", folder)
    assert core.fingerprint == shard.fingerprint


@pytest.mark.parametrize("step", [BLOCK, 1])
@pytest.mark.parametrize("shape", ["deepseek_v3", "wide latent", "qwen3_moe"])
def test_single_rows_after_going_back_are_those_of_the_shard(
    shape: str, step: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, core = loaded(shape, "int8", folder)
    rows, wanted = text(core.hidden, 0), alone(shard, 0)
    for attending in core._attending:
        if attending.folded:
            monkeypatch.setattr(attending.folded, "step", step)
    cache = core.cache(CAPACITY)
    core.run([Part(cache, np.full_like(rows, np.nan), 0)])
    for base_pos, count in [
        (0, 130),
        (127, 1),
        (128, 1),
        (64, 20),
        (63, 1),
        (64, 1),
        (65, 1),
        (2, 1),
        (3, 60),
    ]:
        [got] = core.run([Part(cache, rows[base_pos : base_pos + count], base_pos)])
        assert np.array_equal(got, wanted[base_pos : base_pos + count])


def test_a_batch_may_have_as_many_rows_as_the_engine_takes(folder: Path) -> None:
    shard, core = loaded("deepseek_v3", "int8", folder)
    rows = text(core.hidden, 0)
    count, rest = divmod(core.most_rows, CAPACITY)
    parts = [Part(core.cache(CAPACITY), rows, 0) for _ in range(count)]
    parts.append(Part(core.cache(CAPACITY), rows[:rest], 0))
    for got in core.run(parts):
        assert np.array_equal(got, alone(shard, 0)[: len(got)])


def test_a_session_that_goes_back_forgets_what_was_behind(folder: Path) -> None:
    shard, core = loaded("qwen3_moe", "int8", folder)
    rows = text(core.hidden, 0)
    mine, other = core.cache(CAPACITY), core.cache(CAPACITY)
    core.run([Part(mine, text(core.hidden, 1)[:40], 0), Part(other, rows[:1], 0)])
    [again, _] = core.run([Part(mine, rows[:20], 0), Part(other, rows[1:2], 1)])
    assert np.array_equal(again, alone(shard, 0)[:20])
    assert mine.have == 20


def test_a_self_test_finds_an_engine_whose_rows_depend_on_their_company(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_of("qwen3_moe", "int8", folder)
    monkeypatch.setattr(engine, "COPIES", 0)
    monkeypatch.setattr(attention, "_ONE", 1)
    assert not OnnxRuntimeEngine.load(TierFolder.open(bundle, "cloud"), threads=1).exact


@pytest.mark.parametrize("others", [(BLOCK,), (BLOCK, 1)])
def test_where_folded_heads_give_other_bits_they_are_folded_otherwise_or_not(
    others: tuple[int, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Folded.run

    def otherwise(self: Folded, *arguments: Any) -> Single:
        single = run(self, *arguments)
        if self.step in others:
            arguments[-1][:] = np.nextafter(arguments[-1], np.float32(np.inf))
        return single

    monkeypatch.setattr(Folded, "run", otherwise)
    shard, _ = loaded("deepseek_v3", "int8", folder)
    core = OnnxRuntimeEngine.load(
        TierFolder.open(bundle_of("deepseek_v3", "int8", folder), "cloud"), threads=1
    )
    assert core.exact
    steps = {attending.folded.step for attending in core._attending if attending.folded}
    assert steps == {0 if 1 in others else 1}
    cache, rows = core.cache(CAPACITY), text(core.hidden, 0)
    got = [core.run([Part(cache, rows[[at]], at)])[0] for at in range(5)]
    assert np.array_equal(np.concatenate(got), alone(shard, 0)[:5])


@pytest.mark.parametrize(("heads", "threads", "groups"), [(2, 1, 1), (16, 2, 2), (16, 64, 2), (20, 4, 2)])
def test_folded_heads_are_attention_to_the_positions_there_are(heads: int, threads: int, groups: int) -> None:
    size, scale = 80, 0.1
    attending = folded(Attention(b"", "qkv", "out", heads, 1, size, scale, ("qkv", "key")), threads)
    assert attending is not None
    assert attending.groups == groups
    random = np.random.default_rng(0)
    latents = random.standard_normal((Folded.slots(200), size)).astype(np.float32)
    single = None
    for position in (0, 63, 64, 127, 128, 199):
        qkv = random.standard_normal((heads + 2) * size).astype(np.float32)
        out = np.empty(heads * size, np.float32)
        single = attending.run(single, latents, position, qkv, out)
        assert np.array_equal(latents[position], qkv[-size:])
        seen = latents[: position + 1].astype(np.float64)
        scores = np.exp(scale * qkv[: heads * size].reshape(heads, size) @ seen.T)
        wanted = (scores / scores.sum(1, keepdims=True)) @ seen
        assert np.allclose(out.reshape(heads, size), wanted, atol=1e-5)


def test_a_cache_takes_the_memory_that_is_reserved_for_it(folder: Path) -> None:
    for shape in ("llama", "deepseek_v3", "wide latent"):
        _, core = loaded(shape, "int8", folder)
        for capacity in (1, 100, 128):
            layers = core.cache(capacity).memory
            assert core.cache_bytes(capacity) == sum(kept.nbytes for layer in layers for kept in layer)


def test_what_cannot_be_is_refused_and_nothing_is_computed(folder: Path) -> None:
    _, core = loaded("llama", "int8", folder)
    rows = text(core.hidden, 0)
    fine, wrong = core.cache(CAPACITY), core.cache(10)
    for part, error, words in [
        (Part(wrong, rows[:11], 0), InvalidRequest, "positions 0 to 10 in a session of 10"),
        (Part(wrong, rows[:1], -1), InvalidRequest, "positions -1"),
        (Part(wrong, rows[:0], 0), InvalidRequest, "takes float32"),
        (Part(wrong, rows[:1, :8], 0), InvalidRequest, "takes float32"),
        (Part(wrong, rows[:1].astype(np.float64), 0), InvalidRequest, "not float64"),
        (Part(wrong, rows[:1], 3), OutOfSequence, "only 0 positions are here"),
    ]:
        with pytest.raises(error, match=words):
            core.run([Part(fine, rows[:5], 0), part])
        assert fine.have == 0


@pytest.mark.parametrize("before", [None, "0"])
def test_loading_tells_how_far_it_is_and_leaves_the_environment_as_it_was(
    before: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ORT_GQA_DISABLE_FLASH_ATTENTION", raising=False)
    if before:
        monkeypatch.setenv("ORT_GQA_DISABLE_FLASH_ATTENTION", before)
    cloud = TierFolder.open(bundle_of("qwen3_moe", "int8", folder), "cloud")
    told: list[tuple[int, int]] = []
    environment = dict(os.environ)
    OnnxRuntimeEngine(cloud, threads=1, progress=lambda done, total: told.append((done, total)))
    assert os.environ == environment
    size = cloud.files["weights.bin"].size
    assert {total for _, total in told} == {size}
    (checked, _), *loaded = told
    assert [checked, loaded[-1][0]] == [size, size]
    assert [*loaded] == sorted(set(loaded))
    assert len(loaded) > 2
