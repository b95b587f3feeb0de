"""Who takes part: descriptions, names, and who is waited for."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo

from tests.cloud.federations import LocalGrid, Site, Stopped, begin, equal, events, run, sites
from trifold.cloud.federation import roster as roster_module
from trifold.cloud.federation.exchange import RECORD, Record
from trifold.cloud.federation.folder import RunFolder
from trifold.cloud.federation.roster import Roster
from trifold.shared.errors import Unavailable
from trifold.shared.federation.packing import pack


def roster(grid: LocalGrid, refused: list[tuple[str, str]], count: int) -> Roster:
    def tell(site: str, reason: str) -> None:
        refused.append((site, reason))

    return Roster(grid, {"lora": "{}"}, tell, count=count, deadline=5.0, model=None)


class ComingGrid(LocalGrid):
    """The nodes of `coming` are there from the given look on. `looks` counts the looks before each round."""

    def __init__(self, *sites: Site, coming: dict[int, int] | None = None) -> None:
        super().__init__(*sites)
        self.looks = Counter[int]()
        self._coming = coming or {}
        self._looked = self._since = 0

    def get_nodes(self) -> Iterable[NodeInfo]:
        self._looked += 1
        self._since += 1
        return [node for node in super().get_nodes() if self._looked >= self._coming.get(node.node_id, 0)]

    def _push(self, message: Message) -> str:
        if number := message.content.config_records[RECORD].get("round"):
            assert isinstance(number, int)
            self.looks[number] += self._since
            self._since = 0
        return super()._push(message)


def test_too_few_sites_end_the_wait_naming_those_that_are_there(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", deadline=0.2)
    with pytest.raises(Unavailable, match=r"for 3 sites, and there are: clinic, press"):
        run(folder, LocalGrid(*sites(tmp_path / "sites", "clinic", "press")))


def test_a_site_with_another_bundle_is_refused_by_name(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", rounds=1, sites=2)
    other = Site("attic", tmp_path / "sites", digest="e" * 64)
    done = run(folder, LocalGrid(other, *sites(tmp_path / "sites", "clinic", "press")))
    assert done.taken == {"clinic": 1, "press": 1}
    (event,) = events(folder, "refused")
    assert event["site"] == "attic"
    assert event["reason"] == "its serving_digest is eeeeeeeeeeee, the run's is dddddddddddd"


def test_where_nodes_are_registered_under_names_their_own_word_does_not_count(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", rounds=1)
    grid = LocalGrid(*sites(tmp_path / "sites"))
    grid.registered = {100: "ward-7"}
    assert set(run(folder, grid).taken) == {"press", "school", "ward-7"}


@pytest.mark.parametrize(
    "description",
    [
        {"site": "../../etc"},
        {"site": 7},
        {"shapes": "[1"},
        {"shapes": '{"m.lora_A": [1000000, 1000000]}'},
        {"shapes": '{"m.lora_A": [-4, 24]}'},
        {"shapes": "{}"},
        {"data": b""},
        {"data": "text"},
        {"serving_digest": 1},
        {"serving_digest": "\x1b[2J"},
    ],
)
def test_a_description_that_makes_no_sense_is_refused(tmp_path: Path, description: Record) -> None:
    class Liar(Site):
        def answer(self, action: str, request: Record) -> Record:
            answer = super().answer(action, request)
            return answer | description if action == "query.describe" else answer

    folder = begin(tmp_path / "run", rounds=1, sites=2)
    done = run(folder, LocalGrid(Liar("liar", tmp_path / "liar"), *sites(tmp_path / "s", "clinic", "press")))
    assert set(done.taken) == {"clinic", "press"}
    assert len(events(folder, "refused")) == 1


def test_the_newest_node_of_a_name_holds_it_and_the_next_one_when_it_has_left(tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []
    grid = LocalGrid(*sites(tmp_path / "sites"), Site("press", tmp_path / "sites"))
    found = roster(grid, told, 3)
    found.settle()
    assert found.gather(3) == {"clinic": 100, "press": 103, "school": 102}
    del grid.nodes[103]
    found._pauses.clear()
    assert found.gather(3) == {"clinic": 100, "press": 101, "school": 102}
    grid.nodes[99] = Site("press", tmp_path / "sites")
    assert found.gather(3)["press"] == 101
    assert told == [("press", "node 99 has the name of a newer node that is online")]


def test_a_site_that_was_killed_and_started_again_in_a_round_takes_part_in_the_next(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", rounds=3, deadline=0.5)
    grid = LocalGrid(*sites(tmp_path / "sites"))
    old = grid.nodes[102]

    def restart(answer: Record) -> Record:
        # Flower goes on listing the node that was killed.
        if old.name == "school":
            old.name = "dead"
            grid.silent.add("dead")
            grid.nodes[200] = Site("school", tmp_path / "sites")
        return answer

    grid.nodes[100]._spoil = restart
    done = run(folder, grid)
    assert [list(row["lost"]) for row in events(folder, "round")] == [["school"], [], []]
    assert done.taken == {"clinic": 3, "press": 3, "school": 3}


def test_a_site_that_mends_its_bundle_takes_part_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster_module, "_PAUSE", 0.0)
    folder = begin(tmp_path / "run", rounds=4, sites=2)
    attic = Site("attic", tmp_path / "sites", digest="e" * 64)
    grid = LocalGrid(*sites(tmp_path / "sites", "clinic", "press"), attic)

    def mend(answer: Record) -> Record:
        attic._digest = "d" * 64
        return answer

    grid.nodes[100]._spoil = mend
    assert run(folder, grid).taken == {"attic": 4, "clinic": 4, "press": 4}
    assert attic.rounds == [2, 3, 4]


def test_no_round_waits_for_a_node_that_has_never_described_itself(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", rounds=3, deadline=30.0)
    grid = LocalGrid(*sites(tmp_path / "sites"), silent=["mute"])

    def arrive(answer: Record) -> Record:
        grid.nodes[104] = Site("mute", tmp_path / "sites")
        return answer

    grid.nodes[100]._spoil = arrive
    run(folder, grid)
    # Its 30 s were not over when the run was.
    assert events(folder, "refused") == []


def test_a_node_that_comes_while_a_round_goes_on_is_met_before_the_round_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster_module, "_GLANCE", 0.0)
    folder = begin(tmp_path / "run", rounds=1, deadline=0.5)
    grid = LocalGrid(*sites(tmp_path / "sites"))
    rounds: list[int] = []

    class Late(Site):
        def answer(self, action: str, request: Record) -> Record:
            rounds.append(len(events(folder, "round")))
            return super().answer(action, request)

    def arrive(answer: Record) -> Record:
        grid.silent.add("school")
        grid.nodes[104] = Late("late", tmp_path / "sites")
        return answer

    grid.nodes[100]._spoil = arrive
    run(folder, grid)
    assert rounds[0] == 0


def test_a_node_whose_description_is_of_no_use_is_asked_again_ever_less_often(tmp_path: Path) -> None:
    asked = []

    class Away(Site):
        def answer(self, action: str, request: Record) -> Record:
            asked.append(action)
            return {"refusal": "no trainer"}

    told: list[tuple[str, str]] = []
    found = roster(LocalGrid(*sites(tmp_path / "s"), Away("away", tmp_path / "s")), told, 3)
    for _ in range(20):
        assert len(found.sites()) == 3
    assert len(asked) == 1
    pauses = []
    for _ in range(8):
        _, pause = found._pauses[103]
        pauses.append(pause)
        found._pauses[103] = 0.0, pause
        found.sites()
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert told == [("node 103", "no trainer")]


def test_a_resumed_run_waits_for_its_sites_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = begin(tmp_path / "whole", quorum=1)
    expected = run(whole, LocalGrid(*sites(tmp_path / "a")))
    stopped = begin(tmp_path / "stopped", quorum=1)
    grid = LocalGrid(*sites(tmp_path / "b"))
    grid.stop_at = 2
    with pytest.raises(Stopped):
        run(stopped, grid)
    again = ComingGrid(*sites(tmp_path / "b"), coming={101: 2, 102: 4})
    resumed = run(RunFolder.open(stopped.path), again)
    assert equal(resumed.factors, expected.factors)


def test_a_resumed_run_goes_on_with_its_quorum_after_the_deadline(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", rounds=2, deadline=0.3)
    grid = LocalGrid(*sites(tmp_path / "sites"))
    grid.stop_at = 2
    with pytest.raises(Stopped):
        run(folder, grid)
    done = run(folder, LocalGrid(*sites(tmp_path / "sites", "clinic", "press")))
    assert done.taken == {"clinic": 2, "press": 2, "school": 1}


def test_a_site_that_has_left_for_good_is_waited_for_once(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", rounds=4, deadline=0.5)
    grid = ComingGrid(*sites(tmp_path / "sites"))

    def leave(answer: Record) -> Record:
        grid.nodes.pop(102, None)
        return answer

    grid.nodes[101]._spoil = leave
    grid.nodes[102].name = "absent"
    run(folder, grid)
    assert [grid.looks[number] > 1 for number in (2, 3, 4)] == [True, False, False]


def test_a_roster_keeps_no_factors_of_its_sites(tmp_path: Path) -> None:
    many, shapes = 20, {"m.q_proj.lora_A": (8, 2**14), "m.q_proj.lora_B": (2**14, 8)}
    packed = pack({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, "fp32")

    class Large(Site):
        def answer(self, action: str, request: Record) -> Record:
            # Bytes of its own, as from the wire.
            large = {"shapes": json.dumps(shapes), "data": bytes(bytearray(packed))}
            return super().answer(action, request) | large

    grid = LocalGrid(*(Large(f"site-{number}", tmp_path) for number in range(many)))
    tracemalloc.start()
    found = roster(grid, [], many)
    assert len(found.sites()) == many
    known, _ = tracemalloc.get_traced_memory()
    _, factors = found.settle()
    del factors
    settled, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert known < 3 * len(packed)
    assert settled < len(packed)
