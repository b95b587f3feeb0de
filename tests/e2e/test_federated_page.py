"""What docs/federated.md tells people to type works: its blocks are one script, with less work in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.test_readme import ROOT, blocks

PAGE = (ROOT / "docs" / "federated.md").read_text(encoding="utf-8")
WORK = "--set local.steps=20"
LESS = (
    "--set local.steps=2 --set local.sequences=2 --set local.length=32 --set local.evaluate=1 --set rounds=2"
)


def test_the_commands_of_the_page_bring_an_adapter_into_a_bundle(tmp_path: Path) -> None:
    for name in ("models", "deploy"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "texts").mkdir()
    for site, text in {"clinic": "shared", "press": "docs"}.items():
        (tmp_path / "texts" / site).symlink_to(ROOT / text)
    assert WORK in PAGE
    script = "\n".join(["set -ex", *blocks("sh", PAGE)]).replace(WORK, LESS)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "FLWR_HOME": str(tmp_path / "flower")}
    with (tmp_path / "log").open("w") as log:
        typed = subprocess.Popen(
            ["bash", "-c", script],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            assert typed.wait(300) == 0, (tmp_path / "log").read_text()[-2000:]
        finally:
            os.killpg(typed.pid, signal.SIGTERM)
    assert (tmp_path / "runs" / "first" / "page.html").exists()
