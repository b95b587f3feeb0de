"""What docs/deploy.md tells people to type works: a shell for each machine, word by word, in its order.

Names become loopback addresses, ports free ones, and `scp` a copy. With TRIFOLD_TEST_INSTALL, as
`make test-deploy` has it, the machines install from the package index, else they are given the Trifold of
this process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Final, Self

import pytest

from tests.test_readme import ROOT

PAGE: Final = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
PORTS: Final = ("50060", "50061", "50063", "50070", "50071", "8443")
MACHINES: Final = ("cloud", "edge", "device")
REAL: Final = "TRIFOLD_TEST_INSTALL" in os.environ
INSTALL: Final = re.compile(r"^(make wheel|deploy/jetson/install\.sh .*)$", re.M)
NAME: Final = re.compile(rf"\b({'|'.join(MACHINES)})\.example\b(?!:$)", re.M)
"""Of a machine, other than in `scp`."""

ENDED: Final = re.compile(r"ended (\d+)")
PATIENCE: Final = 300


class Shell:
    """The shell of somebody at a machine, in its home folder, as a context; ends what was started in it."""

    def __init__(self, machines: Path, name: str) -> None:
        self.home = machines / name
        environment = os.environ | {"HOME": str(self.home), "MACHINES": str(machines)}
        self._shell = subprocess.Popen(
            ["bash"],
            cwd=self.home,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.enter('scp() { cp -r "$2" "$MACHINES/${3%%.*}/"; }')

    def enter(self, line: str) -> str:
        """What a line prints until it ends; one with & until what it started is ready."""
        assert self._shell.stdin
        self._shell.stdin.write(f"{line}\nprintf '\\nended %s\\n' $?\n")
        self._shell.stdin.flush()
        waits = line.endswith("&")
        shown, ended, ready = [], None, not waits
        assert self._shell.stdout
        overdue = threading.Timer(PATIENCE, self._end)
        overdue.start()
        for said in self._shell.stdout:
            ready = ready or " ready on " in said
            ended = ended or ENDED.fullmatch(said.strip())
            shown.append(said)
            if ended and ready:
                break
        overdue.cancel()
        text = "".join(shown)
        assert ended, f"the shell ended at `{line}`:\n{text}"
        assert ready, f"`{line}` was not ready within {PATIENCE} s:\n{text}"
        assert ended[1] == "0", f"`{line}` failed:\n{text}"
        return text

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._shell.communicate(timeout=PATIENCE)

    def _end(self) -> None:
        os.killpg(self._shell.pid, signal.SIGTERM)


def test_a_newcomer_gets_from_three_bare_machines_to_a_token_over_tls(tmp_path: Path) -> None:
    began = perf_counter()
    for name in MACHINES:
        (tmp_path / name).mkdir()
    _copy_the_repository(tmp_path / "cloud")
    typed = 0
    with ExitStack() as stack:
        shells = {name: stack.enter_context(Shell(tmp_path, name)) for name in MACHINES}
        for machine, line in _lines(_here(PAGE)):
            text = shells[machine].enter(line)
            typed += 1
            if line.startswith("curl"):
                answer = json.loads(text[text.index("{") : text.rindex("}") + 1])
        took = perf_counter() - began
    assert answer["usage"]["completion_tokens"] == 32
    assert "https://127.0.0.1" in line
    installed = "installs included" if REAL else "without installs"
    print(f"\nfrom a copy of the repository to a token over TLS: {typed} commands, {took:.0f} s, {installed}")


def test_a_line_that_fails_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "edge").mkdir()
    with Shell(tmp_path, "edge") as shell, pytest.raises(AssertionError, match="`ls nowhere` failed"):
        shell.enter("ls nowhere")


def test_the_page_installs_on_each_machine() -> None:
    installs = [(machine, line) for machine, line in _lines(PAGE) if INSTALL.fullmatch(line)]
    assert [machine for machine, _ in installs] == ["cloud", "cloud", "edge", "device"]


def _lines(page: str) -> list[tuple[str, str]]:
    """What is typed, and on which machine."""
    blocks = re.findall(r"^```sh (\w+)\n(.*?)^```", page, re.M | re.S)
    return [(machine, line) for machine, block in blocks for line in block.splitlines()]


def _here(page: str) -> str:
    """The page for machines that are all this one."""
    page = NAME.sub("127.0.0.1", page).replace("0.0.0.0", "127.0.0.1")
    for port, free in zip(PORTS, free_ports(len(PORTS)), strict=True):
        page = re.sub(rf"\b{port}\b", str(free), page)
    if REAL:
        return page
    return INSTALL.sub(f"mkdir -p dist && ln -sfn '{Path(sys.executable).parents[1]}' ~/trifold", page)


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [one.getsockname()[1] for one in taken]


def _copy_the_repository(to: Path) -> None:
    """What git would clone, as it is now."""
    if not REAL:
        for name in ("deploy", "models"):
            (to / name).symlink_to(ROOT / name)
        return
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
