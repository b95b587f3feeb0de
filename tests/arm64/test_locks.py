"""The locks in deploy/: wheels of every package, for every platform and Python, on the package index."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.arm64.machine import PLATFORMS, PYTHONS, ROOT, target, uv

pytestmark = pytest.mark.skipif("TRIFOLD_TEST_ARM64" not in os.environ, reason="make test-arm64")


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("lock", ["edge", "device", "gateway", "cloud"])
def test_every_wheel_of_a_lock_exists(lock: str, platform: str, python: str, tmp_path: Path) -> None:
    wanted = ["--require-hashes", "--requirements", str(ROOT / "deploy" / "locks" / f"{lock}.txt")]
    plan = ["pip", "install", "--dry-run", "--only-binary", ":all:", "--target", str(tmp_path)]
    assert "onnxruntime==" in uv(*plan, *target(platform, python), *wanted)
