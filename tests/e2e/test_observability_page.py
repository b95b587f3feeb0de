"""What docs/observability.md tells people to type works, in its order."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.bench.nano import split_nano
from tests.test_readme import ROOT, run, steps, trifold
from trifold.shared.cli.service_process import ServiceProcess

PAGE = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("default_ports")
def test_the_commands_and_programs_of_the_page_work(tmp_path: Path) -> None:
    split_nano(tmp_path / "bundle")
    shown = ""
    with ExitStack() as services:
        for language, block in steps(PAGE):
            if language == "python":
                assert run([sys.executable, "-c", block], tmp_path)
                continue
            for line in block.splitlines():
                _, *arguments = shlex.split(line)
                if arguments[-1] == "&":
                    services.enter_context(ServiceProcess(arguments[:-1], cwd=tmp_path))
                else:
                    shown = trifold(*arguments, cwd=tmp_path)
    assert "Versions" in shown
