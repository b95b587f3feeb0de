"""The core on torch: the rows of the float model, and the same bits in any company."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints import SMALL, save_fp8, save_random
from tests.cloud.parities import FEATURES
from trifold.cloud.core.engines.engine import Part
from trifold.cloud.core.engines.torch.engine import TorchEngine
from trifold.cloud.core.engines.torch.places import Span
from trifold.cloud.core.engines.torch.tiling import TILINGS, Tiling
from trifold.cloud.core.kv.blocks import BLOCK, NOBODYS
from trifold.cloud.core.kv.table import BlockTable
from trifold.cloud.split.split import split
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import Cuts
from trifold.shared.errors import Cancelled, ConfigError, DamagedFile, InvalidRequest, OutOfSequence
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.model.spec import GroupedAttention
from trifold.shared.runtime.shard import Rows
from trifold.shared.settings import WeightFormat
from trifold.shared.training.shard import TorchShard
from trifold.shared.training.slices import FloatSlice

LENGTH = 150
CASES = [(family, name) for family in FEATURES for name in FEATURES[family]]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
FIRST = {family: next(iter(FEATURES[family])) for family in FEATURES}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@cache
def cloud(family: str, name: str, folder: Path) -> TierFolder:
    """The cloud's part of a small random model with float slices: layers 1 and 2 of four.

    Its widths are no multiples of what a processor's vectors hold.
    """
    path = folder / family / name
    odd = {"intermediate_size": 72, "moe_intermediate_size": 40}
    features = {size: odd[size] for size in odd if size in SMALL[family]} | FEATURES[family][name]
    fp8 = features.pop("fp8", False)
    source = save_random(family, path / "checkpoint", **features)
    if fp8:
        source = save_fp8(source, path / "fp8")
    split(Checkpoint.open(source), Cuts(edge=1, cloud=3), path / "bundle", train=True)
    return TierFolder.open(path / "bundle", "cloud")


@cache
def engine(family: str, weights: WeightFormat, folder: Path, device: str = "cpu") -> TorchEngine:
    tier = cloud(family, FIRST[family], folder)
    return TorchEngine.load(tier, device=device, weights=weights, memory=64 << 20)


@cache
def text(hidden: int, seed: int) -> Rows:
    """The rows of one session."""
    return np.random.default_rng(seed).standard_normal((LENGTH, hidden), np.float32)


def errors(found: Rows, wanted: Rows) -> Rows:
    """Of each row: its largest difference over the largest value."""
    largest: Rows = np.abs(found - wanted).max(axis=1) / np.abs(wanted).max(axis=1)
    return largest


def alone(core: TorchEngine, rows: Rows) -> Rows:
    """What becomes of a session's rows in one call."""
    table = core.cache(len(rows))
    [out] = core.run([Part(table, rows, 0)])
    core.release(table)
    return out


@pytest.mark.parametrize(("family", "name"), CASES)
def test_its_rows_are_those_of_transformers(family: str, name: str, folder: Path) -> None:
    tier = cloud(family, name, folder)
    core = TorchEngine.load(tier, weights="fp32")
    assert core.exact
    rows = text(core.hidden, 0)
    with torch.no_grad():
        wanted = TorchShard.load(FloatSlice.open(tier))(torch.from_numpy(rows)[None])[0].numpy()
    assert errors(alone(core, rows), wanted).max() < 1e-4


class Session:
    """A session in the mix: how far it is, and what came out."""

    def __init__(self, core: TorchEngine, seed: int) -> None:
        self.rows = text(core.hidden, seed)
        self.table = core.cache(LENGTH)
        self.out = np.full_like(self.rows, np.nan)

    def part(self, rng: random.Random) -> Part[BlockTable]:
        """A token, a few, or a piece of a prompt; now and then from an earlier position again."""
        start = self.table.have
        if start == LENGTH or (start and rng.random() < 0.05):
            start = rng.randrange(start)
        size = min(rng.choice([1, 1, 1, 1, 2, 5, 17, 64]), LENGTH - start)
        return Part(self.table, self.rows[start : start + size], start)


@pytest.mark.parametrize("family", FEATURES)
def test_a_block_that_was_copied_serves_another_session(family: str, folder: Path) -> None:
    core = engine(family, "fp32", folder)
    rows = text(core.hidden, 0)
    wanted = alone(core, rows)
    first, second = core.cache(LENGTH), core.cache(LENGTH)
    core.run([Part(first, rows, 0)])
    block = core.copy_block(first, 0)
    core.run([Part(first, text(core.hidden, 1), 0)])
    core.paste_block(second, 0, block)
    [out] = core.run([Part(second, rows[BLOCK:], BLOCK)])
    assert np.array_equal(out, wanted[BLOCK:])
    core.release(second)
    with pytest.raises(Cancelled):
        core.paste_block(second, 0, block)
    core.release(first)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("family", FEATURES)
def test_a_row_has_the_same_bits_alone_and_among_fifteen_others(
    family: str, weights: WeightFormat, device: str, folder: Path
) -> None:
    """Sixteen sessions at a time; some are given up in the middle and others admitted in their place."""
    core, rng = engine(family, weights, folder, device), random.Random(0)
    assert core.exact
    wanted = {seed: alone(core, text(core.hidden, seed)) for seed in range(24)}
    sessions = {seed: Session(core, seed) for seed in range(16)}
    compared = 0
    for turn in range(40):
        if turn % 5 == 4:
            core.release(sessions.pop(rng.choice([*sessions])).table)
            seed = rng.choice([*wanted.keys() - sessions.keys()])
            sessions[seed] = Session(core, seed)
        going = rng.sample([*sessions], rng.randint(1, len(sessions)))
        batch = {seed: sessions[seed].part(rng) for seed in going}
        for (seed, part), out in zip(batch.items(), core.run([*batch.values()]), strict=True):
            end = part.base_pos + len(out)
            assert np.array_equal(out, wanted[seed][part.base_pos : end]), (
                f"turn {turn}, from {part.base_pos}"
            )
            assert part.cache.have == end
            compared += len(out)
    for session in sessions.values():
        core.release(session.table)
    assert compared > 1_000
    assert core.pool.free == core.pool.count


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FEATURES)
def test_coarser_weights_stay_near_the_float_model(family: str, device: str, folder: Path) -> None:
    rows = text(engine(family, "fp32", folder).hidden, 0)
    wanted = alone(engine(family, "fp32", folder), rows)
    formats: list[WeightFormat] = ["int8", "bf16"]
    for weights in formats:
        core = engine(family, weights, folder, device)
        # The median: rounding flips the choice of experts in some rows of a random model.
        assert 0 < np.median(errors(alone(core, rows), wanted)) < 0.05


@pytest.mark.parametrize("family", FEATURES)
def test_a_position_takes_the_bytes_of_the_formula(family: str, folder: Path) -> None:
    core = engine(family, "bf16", folder)
    attention = cloud(family, FIRST[family], folder).manifest.serving.spec.layers[1].attention
    if isinstance(attention, GroupedAttention):
        values = 2 * attention.kv_heads * attention.head_dim
    else:
        values = attention.kv_rank + attention.rope_dim
    assert core.cache_bytes(BLOCK) == 2 * 2 * values * BLOCK
    assert core.cache_bytes(10 * BLOCK) == core.cache_bytes(9 * BLOCK + 1) == 10 * core.cache_bytes(1)
    assert core.pool.count == (64 << 20) // core.cache_bytes(1)


@pytest.mark.parametrize("family", FEATURES)
def test_values_without_end_harm_no_row_before_them_and_nobody_who_has_the_blocks_later(
    family: str, folder: Path
) -> None:
    core = TorchEngine.load(cloud(family, FIRST[family], folder), weights="fp32")
    rows = text(core.hidden, 0)
    wanted = alone(core, rows)
    broken = rows.copy()
    broken[40:] = np.inf
    tables = [core.cache(LENGTH) for _ in range(core.pool.free // 3)]
    for table in tables:
        [out] = core.run([Part(table, broken, 0)])
        assert np.array_equal(out[:40], wanted[:40])
    for table in tables:
        core.release(table)
    for _ in tables:
        assert np.array_equal(alone(core, rows[:40]), wanted[:40])


def test_a_batch_filled_up_for_a_cuda_graph_gives_the_same_bits(folder: Path) -> None:
    core = engine("deepseek_v3", "bf16", folder)
    rows = text(core.hidden, 0)
    wanted = alone(core, rows)
    tables = [core.cache(LENGTH) for _ in range(3)]
    for table, length in zip(tables, (5, 70, 149), strict=True):
        core.run([Part(table, rows[:length], 0)])
    spans = [Span(table.blocks, table.have, 1) for table in tables]
    filled = core._places([*spans, Span((NOBODYS,), 0, 1)], 4)
    memory = core._places([Span((NOBODYS,), 0, 1)] * 4, 4)
    memory.copy_from(filled)
    batch = torch.from_numpy(np.stack([rows[5], rows[70], rows[149], rows[0] * 0]))
    with torch.inference_mode():
        assert np.array_equal(core._forward(batch, memory)[:3].numpy(), wanted[[5, 70, 149]])
    for table in tables:
        core.release(table)


class Leaky(Tiling):
    """Products that tell how many rows there were."""

    def over(self, x: Any, product: Any) -> Any:
        return super().over(x, product) * (1 + 1e-5 * x.shape[-2])


def test_where_the_cheapest_tiling_lets_rows_depend_on_others_a_stricter_one_is_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, strict = cloud("qwen3_moe", "plain", folder), Tiling(16, fixed=True)
    monkeypatch.setitem(TILINGS, "cpu", (Leaky(4), strict))
    core = TorchEngine.load(tier, weights="fp32")
    assert core.exact
    assert core.tiling is strict
    rows = text(core.hidden, 0)
    assert errors(alone(core, rows), alone(engine("qwen3_moe", "fp32", folder), rows)).max() < 1e-4
    monkeypatch.setitem(TILINGS, "cpu", (Leaky(4),))
    assert not TorchEngine.load(tier, weights="fp32").exact


def test_its_fingerprint_tells_engine_version_processor_and_weights(folder: Path) -> None:
    prints = {weights: engine("llama", weights, folder).fingerprint for weights in ("fp32", "bf16", "int8")}
    again = TorchEngine.load(cloud("llama", "plain", folder), weights="fp32")
    assert again.fingerprint == prints["fp32"]
    assert len(set(prints.values())) == 3
    assert prints["int8"].startswith(f"torch-{torch.__version__}/cpu-int8/")


def test_what_cannot_be_is_refused_and_nothing_is_computed(folder: Path) -> None:
    core = engine("llama", "fp32", folder)
    rows = text(core.hidden, 0)
    fine, short, gone = core.cache(LENGTH), core.cache(10), core.cache(10)
    core.release(gone)
    for part, error, words in [
        (Part(short, rows[:11], 0), InvalidRequest, "positions 0 to 10 in a session of 10"),
        (Part(short, rows[:0], 0), InvalidRequest, "takes float32"),
        (Part(short, rows[:1], 3), OutOfSequence, "only 0 positions are here"),
        (Part(gone, rows[:1], 0), Cancelled, "given up"),
    ]:
        with pytest.raises(error, match=words):
            core.run([Part(fine, rows[:5], 0), part])
        assert fine.have == 0
    core.release(fine)
    core.release(short)


def test_a_bundle_without_float_weights_is_refused_with_what_to_do(bundle: Path) -> None:
    with pytest.raises(ConfigError, match=r"--engine torch computes with; .*`trifold split --train`"):
        TorchEngine.load(TierFolder.open(bundle, "cloud"))


def test_a_gpu_that_is_not_here_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="finds no CUDA here"):
        TorchEngine.load(cloud("llama", "plain", folder), device="cuda")


@pytest.mark.parametrize("place", [0.3, 0.6, 0.999])
def test_float_weights_with_a_flipped_bit_are_refused(place: float, tmp_path: Path) -> None:
    source = save_random("qwen3_moe", tmp_path / "checkpoint")
    split(Checkpoint.open(source), Cuts(edge=1, cloud=3), tmp_path / "bundle", train=True)
    path = tmp_path / "bundle" / "cloud" / "float.safetensors"
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedFile, match=r"float\.safetensors: the contents are not those"):
        TorchEngine.load(TierFolder.open(tmp_path / "bundle", "cloud"), weights="fp32")


def test_progress_is_told_of_the_weights_checked_and_then_of_those_loaded(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    tier = cloud("llama", "plain", folder)
    TorchEngine.load(tier, progress=lambda done, total: told.append((done, total)))
    size = (tier.path / "float.safetensors").stat().st_size
    assert {total for _, total in told} == {size}
    done = [count for count, _ in told]
    assert done[0] == done[-1] == size
    assert done[1:] == sorted(done[1:])
    assert len(done) > 10
