"""What the README tells people to type works: every block of it is executed, in order, in an empty folder."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

import pytest

from trifold.device import Chunk, Trace
from trifold.device.client.trace import LinkUse, TierTime
from trifold.shared.cli.service_process import ServiceProcess

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SDK = (ROOT / "docs" / "sdk.md").read_text(encoding="utf-8")


def blocks(language: str, page: str = README) -> Iterator[str]:
    return (match[1] for match in re.finditer(rf"^```{language}\n(.*?)^```", page, re.M | re.S))


def steps(page: str) -> Iterator[tuple[str, str]]:
    """What is to be typed, in the order of the page: `sh` or `python`, and the block."""
    found = re.finditer(r"^```(sh|python)\n(.*?)^```", page, re.M | re.S)
    return ((match[1], match[2]) for match in found)


def run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"`{shlex.join(command)}` failed:\n{done.stderr}"
    return done.stdout


def trifold(*arguments: str, cwd: Path) -> str:
    return run([sys.executable, "-m", "trifold.shared.cli.main", *arguments], cwd)


@pytest.mark.usefixtures("default_ports")
def test_the_commands_and_programs_of_the_readme_and_the_sdk_page_work_in_order(
    tmp_path: Path,
) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    with ExitStack() as services:
        for language, block in [*steps(README), *steps(SDK)]:
            if language == "python":
                assert run([sys.executable, "-c", block], cwd=tmp_path)
                continue
            for line in block.splitlines():
                program, *arguments = shlex.split(line)
                if arguments[-1] == "&":
                    assert program == "trifold"
                    services.enter_context(ServiceProcess(arguments[:-1], cwd=tmp_path))
                elif program == "trifold":
                    assert trifold(*arguments, cwd=tmp_path)
                else:
                    assert run([program, *arguments], cwd=tmp_path)


def test_the_readme_has_something_to_execute() -> None:
    assert len(list(blocks("sh"))) >= 3
    assert len(list(blocks("python"))) >= 1
    assert len(list(blocks("python", SDK))) >= 5


@pytest.mark.parametrize("of", [Chunk, Trace, TierTime, LinkUse])
def test_the_page_of_the_sdk_names_every_field(of: type[Chunk | Trace | TierTime | LinkUse]) -> None:
    missing = [field.name for field in fields(of) if f"`{field.name}`" not in SDK]
    assert not missing


def test_the_make_targets_that_are_named_exist() -> None:
    named = set(re.findall(r"make ([\w-]+)", README))
    assert {"demo", "test"} <= named
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert named <= set(targets)


def test_links_inside_the_repository_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert not broken
