from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.cloud.federations import (
    INITIAL,
    SHAPES,
    LocalGrid,
    Site,
    Stopped,
    begin,
    equal,
    events,
    run,
    sites,
)
from trifold.cloud.federation.exchange import Record
from trifold.cloud.federation.folder import RunFolder
from trifold.cloud.federation.metrics import FILE
from trifold.cloud.federation.run import ADAPTER
from trifold.shared.bundle.factors import LoraFactors
from trifold.shared.errors import ConfigError, DamagedFile, Unavailable
from trifold.shared.federation.packing import pack, unpack

STATEFUL: list[dict[str, Any]] = [
    {},
    {"strategy": "fedadam", "update": "int8-2:4", "fraction": 0.5},
    {"strategy": "fedyogi"},
    {"strategy": "fedavgm"},
    {"aggregation": "svd"},
    {"strategy": "trimmed-mean", "options": {"beta": 0.4}},
]


@pytest.mark.parametrize("settings", STATEFUL)
@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_that_was_stopped_in_a_round_ends_with_the_same_bits(
    tmp_path: Path, settings: dict[str, Any], stop: int
) -> None:
    whole = begin(tmp_path / "whole", **settings)
    expected = run(whole, LocalGrid(*sites(tmp_path / "a")))

    stopped = begin(tmp_path / "stopped", **settings)
    grid = LocalGrid(*sites(tmp_path / "b"))
    grid.stop_at = stop
    with pytest.raises(Stopped):
        run(stopped, grid)
    again = LocalGrid(*sites(tmp_path / "b"))
    resumed = run(RunFolder.open(stopped.path), again)

    assert equal(resumed.factors, expected.factors)
    assert resumed.random == expected.random
    assert (stopped.path / ADAPTER).stat().st_size == (whole.path / ADAPTER).stat().st_size
    assert [row["round"] for row in events(stopped, "round")] == [1, 2, 3, 4]


def test_an_answer_that_was_there_before_the_stop_is_not_computed_again(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", rounds=2)
    there, late = sites(tmp_path / "sites", "clinic", "press"), sites(tmp_path / "sites", "school")
    grid = LocalGrid(*there, *late)

    def die(answer: Record) -> Record:
        raise Stopped

    late[0]._spoil = die
    with pytest.raises(Stopped):
        run(folder, grid)
    late[0]._spoil = None
    run(folder, grid)
    assert there[0].rounds == [1, 2]


def test_sites_move_the_factors_towards_their_goals(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", rounds=6)
    run(folder, LocalGrid(*sites(tmp_path / "sites")))
    (evaluation,) = events(folder, "evaluation")
    first = events(folder, "round")[0]["sites"]
    after = [evaluation["sites"][site]["heldout"] for site in first]
    assert sum(after) < 0.7 * sum(report["heldout"] for report in first.values())


def test_the_adapter_is_one_that_a_bundle_takes(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", rounds=1, lora={"rank": 4, "alpha": 8.0})
    done = run(folder, LocalGrid(*sites(tmp_path / "sites")))
    factors = LoraFactors.load(folder.path / ADAPTER)
    assert (factors.rank, factors.alpha) == (4, 8.0)
    assert equal(load_file(folder.path / ADAPTER), done.factors)


def _nan(answer: Record) -> Record:
    spoiled = unpack(answer["data"], SHAPES, "fp32")
    spoiled["m.q_proj.lora_B"][2, 1] = np.nan
    header = pack(INITIAL, "fp32")[:36]
    return answer | {"data": header + b"".join(spoiled[name].tobytes() for name in sorted(SHAPES))}


def _loud(answer: Record) -> Record:
    return answer | {
        "data": pack({n: 100 * a for n, a in unpack(answer["data"], SHAPES, "fp32").items()}, "fp32")
    }


BAD = {
    "NaN": (_nan, r"lora_B holds NaN"),
    "a norm 100 times that of others": (_loud, r"times that of the other sites"),
    "another shape": (
        lambda answer: answer | {"data": pack({"m.q_proj.lora_A": np.ones((8, 20), np.float32)}, "fp32")},
        r"names or shapes|claims",
    ),
    "another dtype": (
        lambda answer: answer | {"data": pack(INITIAL, "int8")},
        r"dtype is int8, agreed was fp32",
    ),
    "a gigabyte": (lambda answer: answer | {"data": answer["data"][:36] + bytes(2**20)}, r"bytes instead of"),
    "nothing": (lambda answer: {"seconds": 0.0}, r"0 bytes are no update"),
    "words for a weight": (lambda answer: answer | {"data": b"x" * 700}, r"no update of this version"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_site_that_sends_a_bad_update_is_refused_by_name_and_the_round_is_unharmed(
    tmp_path: Path, what: str
) -> None:
    spoil, reason = BAD[what]
    settings = {"rounds": 2, "update": "fp32", "sites": 2}
    good = run(begin(tmp_path / "good", **settings), LocalGrid(*sites(tmp_path / "a", "clinic", "press")))

    folder = begin(tmp_path / "bad", **settings)
    villain = Site("villain", tmp_path / "b", spoil=spoil)
    done = run(folder, LocalGrid(*sites(tmp_path / "b", "clinic", "press"), villain))
    assert equal(done.factors, good.factors)
    refused = events(folder, "refused")
    assert [(event["round"], event["site"]) for event in refused] == [(1, "villain"), (2, "villain")]
    assert all(re.search(reason, event["reason"]) for event in refused)
    assert done.taken == {"clinic": 2, "press": 2}


def test_the_residual_of_a_refused_update_is_dropped_with_it(tmp_path: Path) -> None:
    calls = []

    def once(answer: Record) -> Record:
        calls.append(answer)
        return answer | {"data": b""} if len(calls) == 1 else answer

    folder = begin(tmp_path / "run", rounds=3)
    fickle = Site("school", tmp_path / "sites", spoil=once)
    done = run(folder, LocalGrid(*sites(tmp_path / "sites", "clinic", "press"), fickle))
    assert [event["site"] for event in events(folder, "refused")] == ["school"]
    assert done.taken == {"clinic": 3, "press": 3, "school": 3}


def test_a_silent_site_holds_a_round_up_no_longer_than_the_deadline_and_the_next_do_without(
    tmp_path: Path,
) -> None:
    folder = begin(tmp_path / "run", rounds=2, deadline=0.3)
    grid = LocalGrid(*sites(tmp_path / "sites"))

    def hush(answer: Record) -> Record:
        grid.silent.add("school")
        return answer

    grid.nodes[100]._spoil = hush
    grid.nodes[102].name = "school"
    done = run(folder, grid)
    lost = [row["lost"] for row in events(folder, "round")]
    assert lost == [{"school": "no answer within 0.3 s"}, {}]
    assert done.taken == {"clinic": 2, "press": 2}


def test_a_site_whose_process_ended_is_lost_and_named(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", rounds=1, deadline=0.3)
    grid = LocalGrid(*sites(tmp_path / "sites"))

    def crash(answer: Record) -> Record:
        grid.broken.add("school")
        return answer

    grid.nodes[101]._spoil = crash
    run(folder, grid)
    (row,) = events(folder, "round")
    assert row["lost"] == {"school": "the process ended"}


def test_a_round_without_its_quorum_is_tried_again_and_then_the_run_stops_to_be_resumed(
    tmp_path: Path,
) -> None:
    folder = begin(tmp_path / "run", rounds=2, deadline=0.2, quorum=3, attempts=2)
    grid = LocalGrid(*sites(tmp_path / "sites"))
    grid.nodes[102]._spoil = lambda answer: {"refusal": "the text is away"}
    with pytest.raises(Unavailable, match=r"round 1 had 2 of the 3 updates.*2 times.*the text is away"):
        run(folder, grid)
    assert len(events(folder, "asked")) == 2
    grid.nodes[102]._spoil = None
    assert run(folder, grid).round == 2


def test_what_a_crash_left_undone_after_the_last_checkpoint_is_done_on_resuming(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", rounds=2)
    grid = LocalGrid(*sites(tmp_path / "sites"))
    done = run(folder, grid)
    rounds = events(folder, "round")

    # As after a kill right behind the checkpoint: the adapter is that of the round before, or none.
    kept = [line for line in (folder.path / FILE).read_text().splitlines() if '"event": "round"' not in line]
    (folder.path / FILE).write_text("\n".join([json.dumps(rounds[0]), *kept]))
    for stale in (b"of round 1", None):
        (folder.path / ADAPTER).unlink()
        if stale:
            (folder.path / ADAPTER).write_bytes(stale)
        assert equal(run(RunFolder.open(folder.path), grid).factors, done.factors)
        assert equal(load_file(folder.path / ADAPTER), done.factors)
        told = [{name: value for name, value in row.items() if name != "time"} for row in rounds]
        assert [{n: v for n, v in row.items() if n != "time"} for row in events(folder, "round")] == told


def test_a_folder_that_holds_a_run_is_not_begun_again(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run already"):
        begin(tmp_path / "run")


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", rounds=2)
    run(folder, LocalGrid(*sites(tmp_path / "sites")))
    last = sorted(folder.checkpoints.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:100])
    with pytest.raises(DamagedFile, match=r"round-000002\.safetensors.*go back a round"):
        run(folder, LocalGrid(*sites(tmp_path / "sites")))
    last.unlink()
    assert run(folder, LocalGrid(*sites(tmp_path / "sites"))).round == 2
