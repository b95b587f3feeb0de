"""What the engine on TensorRT plans before it computes: slots, shapes, and where it keeps what it built."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.cloud.tensorrt_graphs import CUTS
from tests.shared.sites import train_bundle
from trifold.cloud.core.engines.tensorrt.plans import Key, Plans
from trifold.cloud.core.engines.tensorrt.profiles import DECODE, PROMPT, Limits, padded, profiles, sizes
from trifold.cloud.core.engines.tensorrt.slots import Slots
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.errors import ConfigError, Overloaded, PromptTooLong


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bundle("qwen3_moe", tmp_path_factory.mktemp("plans"), cuts=CUTS)[1]


def test_slots_are_handed_out_from_the_lowest_and_no_more_than_there_are() -> None:
    slots = Slots(Limits(sessions=4, positions=100, rows=10))
    taken = [slots.take(50) for _ in range(4)]
    with pytest.raises(Overloaded) as told:
        slots.take(50)
    assert told.value.retry_after
    slots.give_back(taken[2])
    slots.give_back(taken[1])
    assert slots.take(50).slot == 1
    slots.give_back(taken[1])  # a second time, when another has it
    assert slots.take(50).slot == 2
    with pytest.raises(PromptTooLong):
        slots.take(101)


def test_a_row_that_nobody_wants_is_written_behind_what_a_session_has() -> None:
    limits = Limits(sessions=4, positions=100, rows=10)
    slots = Slots(limits)
    slots.take(100).have = 100
    slots.take(100).have = 7
    assert slots.free_positions(4) == [100, 7, 0, 0]
    assert limits.slots > 100


@pytest.mark.parametrize("limits", [Limits(), Limits(5, 200, 64), Limits(sessions=64, positions=64, rows=64)])
def test_every_batch_that_the_engine_makes_is_within_a_profile(limits: Limits) -> None:
    made = profiles(limits)
    declared = {
        "rows": (-1, -1, 64),
        "positions": (-1, -1),
        "write_at": (-1,),
        "past": (-1, 2, limits.slots, 16),
    }
    for shape in declared.values():
        for profile in made:
            least, typical, most = profile.shapes(shape)
            assert all(a <= b <= c for a, b, c in zip(least, typical, most, strict=True))
    assert made[DECODE].shapes(declared["rows"]) == (
        (1, 1, 64),
        (made[DECODE].sessions[1], 1, 64),
        (limits.sessions, 1, 64),
    )
    assert made[PROMPT].shapes(declared["past"])[2] == (1, 2, limits.slots, 16)
    assert made[PROMPT].shapes(declared["rows"])[2] == (1, limits.rows, 64)
    assert all(count <= padded(count, limits) <= limits.sessions for count in range(1, limits.sessions + 1))
    assert {padded(count, limits) for count in range(1, limits.sessions + 1)} == {*sizes(limits)}


@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_cache_of_every_slot_begins_where_tensorrt_lets_a_tensor_begin(itemsize: int) -> None:
    for positions in (32, 100, 4095, 4096):
        assert Limits(positions=positions, rows=1).slots * 16 * itemsize % 256 == 0


@pytest.mark.parametrize("wrong", [{"sessions": 3}, {"rows": 5000}, {"positions": 8, "rows": 8}])
def test_limits_that_cannot_be_served_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="sessions are 4"):
        Limits(**wrong)


def test_sessions_are_no_more_than_memory_has_room_for() -> None:
    limits = Limits(sessions=16, positions=4096, rows=512)
    assert limits.fitting(100 << 20, 10 << 20).sessions == 10
    assert limits.fitting(1 << 40, 10 << 20) == limits
    with pytest.raises(ConfigError, match="room for 3 sessions of 4096 positions, 10 MiB each"):
        limits.fitting(39 << 20, 10 << 20)


def key(bundle: Path, **changes: Any) -> Key:
    folder = TierFolder.open(bundle, "cloud")
    return dataclasses.replace(Key.of(folder, "NVIDIA H100", (9, 0), "10.15.1", "bf16", Limits()), **changes)


def test_an_engine_is_found_again_by_all_that_it_depends_on(bundle: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"gpu": "NVIDIA H200"},
        {"capability": (8, 9)},
        {"library": "10.15.2"},
        {"serving_digest": "0" * 64},
        {"floats": "0" * 64},
        {"precision": "fp8"},
        {"limits": Limits(sessions=17)},
        {"revision": 0},
    ]
    names = [key(bundle, **change).plan for change in changes]
    assert len({*names}) == len(changes)
    assert key(bundle).plan == names[0]
    digest = TierFolder.open(bundle, "cloud").manifest.serving_digest
    assert names[0].startswith(f"nvidia-h100-sm90-10.15.1-{digest[:12]}-bf16-")
    assert key(bundle, serving_digest="0" * 64).timings == "nvidia-h100-sm90-10.15.1.timings"


def test_plans_are_kept_whole_and_only_where_nobody_else_can_write(tmp_path: Path) -> None:
    plans = Plans(tmp_path / "kept" / "here")
    assert plans.read("a.plan") == b""
    plans.keep("a.plan", b"engine")
    assert Plans(plans.folder).read("a.plan") == b"engine"
    plans.folder.chmod(0o770)
    with pytest.raises(ConfigError, match="others may write"):
        Plans(plans.folder)
