"""What a site may answer: whatever it is, it costs no other site the round."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_utils import pull_objects

from tests.cloud.federations import LocalGrid, Site, begin, events, run, sites
from trifold.cloud.federation.checkpoint import Checkpoint
from trifold.cloud.federation.exchange import Record
from trifold.cloud.federation.folder import RunFolder
from trifold.cloud.federation.metrics import FILE


def lost(folder: Path, spoil: Callable[[Record], Record]) -> tuple[RunFolder, str]:
    """The run of a round with such a site and two honest ones, and why the site was lost."""
    begun = begin(folder / "run", rounds=1, deadline=0.5)
    honest = sites(folder / "sites", "clinic", "press")
    done = run(begun, LocalGrid(*honest, Site("villain", folder / "sites", spoil=spoil)))
    assert done.taken == {"clinic": 1, "press": 1}
    (event,) = events(begun, "lost")
    assert event["site"] == "villain"
    return begun, event["reason"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows_up", float("nan")),
        ("rows_up", float("inf")),
        ("rows_up", 1.7e308),
        ("gradients_down", 2**62),
        ("seconds", -1.0),
        ("heldout", float("-inf")),
    ],
)
def test_a_number_that_cannot_be_loses_the_site_that_told_it(tmp_path: Path, name: str, value: float) -> None:
    assert lost(tmp_path, lambda answer: answer | {name: value})[1].startswith(f"its {name} cannot be ")


@pytest.mark.parametrize("data", ["text", -5, 10**12, 0.5, [1.0, 2.0], True])
def test_an_update_that_is_not_bytes_loses_its_site_and_allocates_nothing(tmp_path: Path, data: Any) -> None:
    reason = lost(tmp_path, lambda answer: answer | {"data": data})[1]
    assert reason == f"its data is {type(data).__name__}, not bytes"


def test_the_parts_of_an_answer_are_waited_for_until_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begin(tmp_path / "run", rounds=1, deadline=5.0)
    grid = LocalGrid(*sites(tmp_path / "sites"))
    waited: list[float] = []
    pull = grid.pull_messages

    def noted(numbers: Iterable[str]) -> Iterable[Message]:
        waited.append((pull_objects.__kwdefaults__ or {})["max_time"])
        return pull(numbers)

    monkeypatch.setattr(grid, "pull_messages", noted)
    run(folder, grid)
    assert waited
    assert all(0 < seconds <= 5 for seconds in waited)


def test_an_answer_that_flower_cannot_read_loses_its_site_alone(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", rounds=1, deadline=0.5)
    grid = LocalGrid(*sites(tmp_path / "sites", "clinic", "press", "villain"))

    def garble(answer: Record) -> Record:
        grid.garbled.add("villain")
        return answer

    grid.nodes[100]._spoil = garble
    assert run(folder, grid).taken == {"clinic": 1, "press": 1}
    (event,) = events(folder, "lost")
    assert event["reason"] == "its answer cannot be read: KeyError: 'no such object'"


def test_of_a_refusal_some_printable_characters_are_kept(tmp_path: Path) -> None:
    words = "\x1b[2J\x1b]0;owned\x07 away\n\u202e" + "x" * 1_000_000
    folder, reason = lost(tmp_path, lambda answer: {"refusal": words})
    assert reason.startswith("[2J ]0;owned away x")
    assert reason.isprintable()
    assert len(reason) <= 302
    assert (folder.path / FILE).stat().st_size < 10_000
    last = Checkpoint.last(folder.checkpoints)
    assert last is not None
    assert last.row["lost"] == {"villain": reason}


def test_a_checkpoint_does_not_grow_with_the_rounds(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", rounds=12)
    run(folder, LocalGrid(*sites(tmp_path / "sites")))
    one = begin(tmp_path / "one", rounds=1)
    run(one, LocalGrid(*sites(tmp_path / "one-site")))
    sizes = [max(path.stat().st_size for path in f.checkpoints.iterdir()) for f in (one, folder)]
    assert np.ptp(sizes) < 200
