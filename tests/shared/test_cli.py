from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trifold.shared.errors import ERRORS, TrifoldError

PLUGIN = """
from trifold.shared.errors import Overloaded

def refuse(after: float = 1.0) -> None:
    "Refuses."
    raise Overloaded("no room: come back", retry_after=after)

def crash() -> None:
    "Crashes."
    raise RuntimeError("the secret of the matter")

def endless() -> None:
    while True:
        print("more")
"""


def trifold(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TMPDIR": str(path or "/tmp"), "COLUMNS": "200"}
    if path:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-m", "trifold.shared.cli.main", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """Another distribution with commands for the console script."""
    (tmp_path / "plugin.py").write_text(PLUGIN)
    info = tmp_path / "plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1\n")
    lines = ["refuse = plugin:refuse", "crash = plugin:crash", "endless = plugin:endless"]
    lines.append("lacking = plugin.not_there:lacking")
    (info / "entry_points.txt").write_text("\n".join(["[trifold.commands]", *lines]))
    return tmp_path


def test_version_names_what_a_report_needs() -> None:
    versions = json.loads(trifold("version", "--json").stdout)
    assert set(versions) == {"trifold", "onnxruntime", "grpcio", "numpy", "python"}
    assert versions["python"] in sys.version
    assert versions["trifold"] in trifold("version").stdout


def test_the_flag_for_the_version_prints_what_the_command_does() -> None:
    ended = trifold("--version")
    assert (ended.returncode, ended.stdout) == (0, trifold("version").stdout)


def test_help_lists_the_commands_of_every_installed_distribution(plugin: Path) -> None:
    ended = trifold("--help", path=plugin)
    assert ended.returncode == 0
    assert "Refuses." in ended.stdout
    assert "version" in ended.stdout


def test_an_error_is_a_message_and_its_exit_code_without_a_traceback(plugin: Path) -> None:
    ended = trifold("refuse", path=plugin)
    assert ended.returncode == 75
    assert ended.stderr == "trifold: no room: come back\n"


@pytest.mark.parametrize("arguments", [("--debug", "refuse"), ("refuse", "--debug")])
def test_debug_shows_the_traceback_of_an_error(plugin: Path, arguments: tuple[str, ...]) -> None:
    ended = trifold(*arguments, path=plugin)
    assert ended.returncode == 75
    assert "Traceback" in ended.stderr
    assert "plugin.py" in ended.stderr


def test_an_unexpected_error_is_short_and_says_where_its_details_are(plugin: Path) -> None:
    ended = trifold("crash", path=plugin)
    assert ended.returncode == TrifoldError.exit_code
    assert "Traceback" not in ended.stderr
    (details,) = plugin.glob("trifold-*.log")
    assert str(details) in ended.stderr
    assert "plugin.py" in details.read_text()


def test_a_command_whose_extra_is_missing_says_which_and_hides_from_nobody(plugin: Path) -> None:
    ended = trifold("lacking", path=plugin)
    assert ended.returncode == ERRORS["CONFIG"].exit_code
    assert "needs the package plugin.not_there" in ended.stderr
    assert "lacking" in trifold("--help", path=plugin).stdout


def test_verify_without_torch_names_its_own_extra_and_explains_itself_all_the_same(
    tmp_path: Path,
) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('No module named torch', name='torch')")
    assert "--tokens" in trifold("verify", "--help", path=tmp_path).stdout
    ended = trifold("verify", "bundle", "--against", "checkpoint", path=tmp_path)
    assert ended.returncode == ERRORS["CONFIG"].exit_code
    assert "needs the package torch: install Trifold with the extra 'verify'" in ended.stderr


def test_the_log_on_a_terminal_is_trifolds_own_from_the_level_on_that_was_asked_for() -> None:
    program = """
import logging
from trifold.shared.cli.logs import show_log
show_log("warning")
logging.getLogger("trifold.device").info("small")
logging.getLogger("trifold.device").warning("great")
logging.getLogger("grpc").info("theirs")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.stderr == "trifold: great\n"


def test_an_unknown_command_is_refused() -> None:
    ended = trifold("explode")
    assert ended.returncode == 2
    assert "explode" in ended.stderr


def test_a_reader_that_leaves_is_no_error_worth_words(plugin: Path) -> None:
    command = f"{sys.executable} -m trifold.shared.cli.main endless | head -1"
    environment = {**os.environ, "PYTHONPATH": str(plugin)}
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, check=False)
    assert (ended.stdout, ended.stderr) == ("more\n", "")
