from __future__ import annotations

import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trifold.edge.service.command import edge
from trifold.shared.errors import ConfigError


def refused(*arguments: str) -> str:
    """The message of the ConfigError that a command ends with."""
    ended = CliRunner().invoke(edge, arguments)
    assert isinstance(ended.exception, ConfigError)
    return ended.exception.message


def test_a_trainer_is_told_its_site_or_that_it_simulates_several(bundle: Path, tmp_path: Path) -> None:
    told = ["train", str(bundle), "--text", str(tmp_path)]
    assert "--site" in refused(*told)
    assert "--simulation" in refused(*told, "--site", "clinic", "--simulation")
    assert "has no folders" in refused(*told, "--simulation")
    assert "no name of a site" in refused(*told, "--site", "../clinic")
    assert "is no folder" in refused("train", str(bundle), "--text", str(tmp_path / "x"), "--site", "clinic")


def test_what_a_trainer_is_told_is_checked_before_it_loads_anything(bundle: Path, tmp_path: Path) -> None:
    told = ["train", str(bundle), "--text", str(tmp_path), "--site", "clinic"]
    assert "--cloud is 'nonsense'" in refused(*told, "--cloud", "nonsense")
    assert "--timeout is" in refused(*told, "--timeout", "0")
    assert "--log-level is 'loud'" in refused(*told, "--log-level", "loud")


def test_a_site_takes_its_settings_from_file_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trifold.toml").write_text('[join]\nsuperlink = "far.example:8443"\ntrainer = "s.sock"\n')
    monkeypatch.chdir(tmp_path)
    assert "give either --root-certificates" in refused("join")
    monkeypatch.setenv("TRIFOLD_JOIN_INSECURE", "yes")
    assert "far.example:8443 is not on loopback" in refused("join")


@pytest.mark.parametrize("certificates", [[], ["--insecure", "--root-certificates", "ca.crt"]])
def test_a_node_has_certificates_or_is_on_loopback(certificates: list[str]) -> None:
    assert "--insecure for loopback" in refused("join", "127.0.0.1:1", "--trainer", "s.sock", *certificates)


def test_a_port_that_is_taken_and_a_state_that_is_no_folder_are_named(bundle: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        told = ["join", "127.0.0.1:1", "--insecure", "--trainer", "s.sock", "--port", port]
        assert f"127.0.0.1:{port} is taken" in refused(*told)
    (tmp_path / "notes.txt").write_text("Some words. " * 50)
    told = ["train", str(bundle), "--text", str(tmp_path), "--site", "clinic"]
    assert "no folder can be made" in refused(*told, "--state", str(tmp_path / "notes.txt"))
