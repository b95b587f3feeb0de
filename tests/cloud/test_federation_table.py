from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.cloud.federations import LocalGrid, Site, begin, events, run, sites
from trifold.cloud.federation.metrics import FILE, Log, read
from trifold.cloud.federation.page import page
from trifold.cloud.federation.table import Progress


def shown(folder: Path, rounds: int = 2, *, at_work: bool = True) -> str:
    out = StringIO()
    Console(width=120, file=out).print(Progress.of(read(folder)).render(rounds, at_work=at_work))
    return out.getvalue()


def test_the_table_has_every_round_with_losses_bytes_and_who_was_refused(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", rounds=2, sites=2)
    villain = Site("villain", tmp_path / "s", spoil=lambda answer: answer | {"data": b""})
    run(folder, LocalGrid(*sites(tmp_path / "s", "clinic", "press"), villain))
    text = shown(folder.path)
    for row in events(folder, "round"):
        assert f"{row['sites']['clinic']['heldout']:.3f}" in text
    assert "villain" in text
    assert "round 2: villain refused: 0 bytes are no update" in text


def test_of_many_sites_it_shows_best_mean_and_worst(tmp_path: Path) -> None:
    names = [f"site-{number}" for number in range(9)]
    folder = begin(tmp_path / "run", rounds=1)
    run(folder, LocalGrid(*sites(tmp_path / "s", *names)))
    losses = [report["heldout"] for report in events(folder, "round")[0]["sites"].values()]
    text = shown(folder.path)
    assert "worst" in text
    assert f"{min(losses):.3f}" in text
    assert f"{max(losses):.3f}" in text
    assert "site-3" not in text


@pytest.mark.parametrize(
    ("written", "line"),
    [
        ([], "waiting for flower-superexec to start the run"),
        ([("begin", {"process": 1})], "waiting for sites"),
        (
            [
                ("begin", {"process": 1}),
                ("asked", {"round": 3, "sites": ["a", "b"]}),
                ("answer", {"site": "a"}),
            ],
            "round 3 of 9: waiting for b",
        ),
        ([("begin", {"process": 1}), ("failed", {"reason": "no quorum"})], "failed: no quorum"),
        (
            [("begin", {"process": 1}), ("failed", {"reason": "x"}), ("begin", {"process": 2}), ("end", {})],
            "0 of 9 rounds done",
        ),
    ],
)
def test_a_line_says_what_happens_now(tmp_path: Path, written: list[tuple[str, Any]], line: str) -> None:
    for event, details in written:
        Log(tmp_path).write(event, **details)
    assert line in shown(tmp_path, rounds=9)


def test_a_line_of_the_log_that_a_crash_cut_short_is_left_out(tmp_path: Path) -> None:
    Log(tmp_path).write("begin", process=1)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"event": "rou')
    assert [event["event"] for event in read(tmp_path)] == ["begin"]
    Log(tmp_path).write("end", round=1)
    assert [event["event"] for event in read(tmp_path)] == ["begin", "end"]


def test_a_run_whose_server_app_is_gone_is_not_said_to_wait(tmp_path: Path) -> None:
    Log(tmp_path).write("begin", process=1)
    Log(tmp_path).write("asked", round=1, sites=["a"])
    assert "waiting for a" in shown(tmp_path)
    assert "the ServerApp was lost: resume the run" in shown(tmp_path, at_work=False)
    Log(tmp_path).write("end", round=2)
    assert "lost" not in shown(tmp_path, at_work=False).splitlines()[-1]


def test_the_table_and_the_page_show_the_seconds_beyond_the_slowest_sites_work(tmp_path: Path) -> None:
    row = {"round": 1, "sites": {"a": {"seconds": 11.0}}, "refused": {}, "lost": {}}
    Log(tmp_path).write("round", **row, seconds=23.5, overhead=12.5)
    for text in (shown(tmp_path), page("x", read(tmp_path))):
        assert "overhead" in text
        assert "12.5" in text
