from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_dashboard import METRICS, metrics_of
from tests.processes import Processes
from tests.site import Service
from trifold.shared.errors import ERRORS


@pytest.fixture(scope="module")
def addresses(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    with (
        Processes(bundle, *METRICS) as tiers,
        Service(tiers, tmp_path_factory.mktemp("journals"), *METRICS) as service,
    ):
        with service.openai() as client:
            client.completions.create(model="trifold", prompt="one two", max_tokens=20, seed=1)
        yield [metrics_of(log) for log in (tiers.log("cloud"), tiers.log("edge"), service.log)]


def top(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trifold.shared.cli.main", "top", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_one_look_shows_sessions_answers_links_and_versions(addresses: list[str]) -> None:
    seen = top(f"http://{addresses[0]}/metrics", *addresses[1:])
    assert seen.returncode == 0, seen.stderr
    # A session whose Close came late is kept, and a first token may take seconds.
    sessions, answers, links, versions = seen.stdout.strip().split("\n\n")
    assert re.search(r"^edge +[01] +64 +0 +[01] +\d+% +\d+\.\d +\d+\.\d m?s", sessions, re.M), sessions
    assert re.search(r"^device +\d+\.\d +\d+\.\d m?s", answers, re.M)
    assert re.search(r"^edge-cloud +edge +\d+ k?B +\d+ k?B +\d+\.\d +\d+\.\d m?s", links, re.M)
    assert re.search(r"^device-edge +device +\d+\.\d m?s", links, re.M)
    for tier, address in zip(("cloud", "edge", "device"), addresses, strict=True):
        assert re.search(rf"^{tier} +{address} .* base +CPUExecutionProvider +yes", versions, re.M)


def test_a_process_that_is_not_there_is_named_and_the_others_are_shown(addresses: list[str]) -> None:
    seen = top(addresses[0], "127.0.0.1:9")
    assert seen.returncode == 0
    assert "127.0.0.1:9 shows no metrics: Connection refused" in seen.stdout
    assert addresses[0] in seen.stdout


def test_where_nobody_shows_metrics_that_is_an_error() -> None:
    seen = top("127.0.0.1:9")
    assert seen.returncode == ERRORS["UNAVAILABLE"].exit_code
    assert "127.0.0.1:9 shows no metrics" in seen.stderr


def test_on_a_terminal_it_goes_on_until_it_is_interrupted(addresses: list[str]) -> None:
    command = [sys.executable, "-m", "trifold.shared.cli.main", "top", *addresses, "--interval", "0.2"]
    program = f"import pty, sys; sys.exit(pty.spawn({command!r}) >> 8)"
    running = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    assert running.stdin
    assert running.stdout
    shown = b""
    while shown.count(b"Versions") < 3:
        read = running.stdout.read(4096)
        assert read, shown
        shown += read
    running.stdin.write(b"\x03")
    running.communicate(timeout=30)
    assert running.returncode == 0
