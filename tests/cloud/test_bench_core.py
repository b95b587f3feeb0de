"""`trifold bench core` counts what it times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from trifold.cloud.bench import core, machine
from trifold.cloud.bench.command import bench


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "SECONDS", 0.0)
    monkeypatch.setattr(machine, "_BYTES", 2**20)
    monkeypatch.setattr(machine, "_SIDE", 64)


def run(bundle: Path, *options: str) -> Result:
    result = CliRunner().invoke(bench, ["core", str(bundle), "--threads", "1", *options])
    assert result.exit_code == 0, result.output
    return result


def test_steps_and_a_prompt_are_timed_and_what_they_read_and_compute_is_counted(bundle: Path) -> None:
    told = json.loads(run(bundle, "--sessions", "4", "--context", "8", "--prompt", "20", "--json").stdout)
    assert [*told["decode"]] == ["1", "2", "4"]
    one, four = told["decode"]["1"], told["decode"]["4"]
    assert four["flops"] == 4 * one["flops"]
    assert one["read_bytes"] < four["read_bytes"] < 4 * one["read_bytes"]
    assert told["prefill"]["rows"] == 20
    assert min(one["seconds"], four["seconds"], told["prefill"]["seconds"]) > 0
    assert told["machine"]["read_rate"] > 0


def test_people_get_a_table_with_a_row_for_each_kind(bundle: Path) -> None:
    lines = run(bundle, "--sessions", "2", "--context", "8", "--prompt", "20").stdout.splitlines()
    assert [line.split(" | ")[0] for line in lines[-3:]] == ["| 1 session", "| 2 sessions", "| prompt of 20"]
