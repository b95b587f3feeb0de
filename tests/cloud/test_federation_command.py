"""`trifold federate`: what it refuses before it begins, and one ServerApp to a run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict
from rich.console import Console
from typer.testing import CliRunner

from tests.cloud.federations import LocalGrid, begin, sites
from trifold.cloud.federation import submit as submit_module
from trifold.cloud.federation.command import _watch, federate
from trifold.cloud.federation.folder import RunFolder
from trifold.cloud.federation.metrics import FILE, Log, read
from trifold.cloud.federation.server_app import main
from trifold.shared.errors import ConfigError, TrifoldError, Unavailable

APP = Path(__file__).parents[2] / "deploy" / "flower"


@pytest.fixture
def superlink() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def failure(*words: str) -> BaseException:
    error = CliRunner().invoke(federate, words).exception
    assert error is not None
    return error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "strategy=fedadam", "--set", "options.etta=1"], "fedadam has no option etta"),
        (["--app", "nowhere"], "nowhere is not the Flower app"),
        (["--set", "local=5", "--set", "local.steps=3"], "--set local.steps=3: local is set to 5"),
        (["--set", 'lora.tiers=["cloud"]'], "lora.tiers.0"),
        (["--simulate", "3"], "a simulation needs both"),
    ],
)
def test_a_start_that_cannot_work_leaves_no_folder(
    tmp_path: Path, superlink: str, words: list[str], message: str
) -> None:
    told = ["run", str(tmp_path / "run"), "--superlink", superlink, "--app", str(APP), *words]
    error = failure(*told)
    assert isinstance(error, ConfigError)
    assert message in error.message
    assert not (tmp_path / "run").exists()


def test_without_flower_no_folder_is_left(
    tmp_path: Path, superlink: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit_module, "_FLWR", tmp_path / "flwr")
    error = failure("run", str(tmp_path / "run"), "--superlink", superlink, "--app", str(APP))
    assert isinstance(error, ConfigError)
    assert "the extra 'federated'" in error.message
    assert not (tmp_path / "run").exists()


def served(folder: RunFolder, flower_run: int = 7) -> None:
    context = Context(flower_run, 0, {}, RecordDict(), {"folder": str(folder.path)})
    main(LocalGrid(*sites(folder.path / "sites")), context)


def test_a_second_server_app_leaves_the_run_of_the_first_alone(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", rounds=1)
    Log(folder.path).write("begin", process=1)
    with folder.locked(), pytest.raises(Unavailable, match="another ServerApp works on it"):
        served(folder)
    assert [event["event"] for event in read(folder.path)] == ["begin"]
    served(folder)
    assert [event["event"] for event in read(folder.path)][-1] == "end"
    assert not folder.at_work()


def test_a_run_is_at_work_as_long_as_its_process_lives_and_not_as_its_number_does(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    held = f"from pathlib import Path; from {RunFolder.__module__} import RunFolder\n"
    held += f"with RunFolder.open(Path({str(folder.path)!r})).locked(): print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        error = failure("resume", str(folder.path), "--app", "nowhere")
        assert isinstance(error, TrifoldError)
        assert "the run is at work" in error.message
        process.send_signal(signal.SIGKILL)
    # A process with the number that the log names is at work, and it is another.
    Log(folder.path).write("begin", process=os.getpid())
    assert "nowhere is not the Flower app" in str(failure("resume", str(folder.path), "--app", "nowhere"))


def test_looking_at_a_run_keeps_no_server_app_from_it(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    assert not folder.at_work()
    with folder.locked():
        assert folder.at_work()
        assert RunFolder.open(folder.path).at_work()


def test_status_shows_that_the_server_app_was_lost_and_writes_the_page(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", rounds=2)
    served(folder)
    lines = (folder.path / FILE).read_text().splitlines()
    (folder.path / FILE).write_text("\n".join(line for line in lines if json.loads(line)["event"] != "end"))
    shown = CliRunner().invoke(federate, ["status", str(folder.path)])
    assert shown.exit_code == 0
    assert "the ServerApp was lost: resume the run" in shown.output
    assert "<polyline" in (folder.path / "page.html").read_text()


def test_a_run_whose_server_app_was_lost_is_not_followed_for_ever(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    Log(folder.path).write("begin", process=os.getpid(), flower_run=7)
    with pytest.raises(Unavailable, match="the ServerApp was lost: go on with"):
        _watch(folder, 7, Console(file=StringIO()))
    Log(folder.path).write("end", round=4)
    assert _watch(folder, 7, Console(file=StringIO())).ended
