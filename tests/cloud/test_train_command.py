from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trifold.cloud.train.command import train
from trifold.shared.errors import ConfigError


def test_a_bundle_without_float_weights_is_refused_with_what_to_do(bundle: Path) -> None:
    with pytest.raises(ConfigError, match="make it again with `trifold split --train`"):
        train(bundle, listen="127.0.0.1:0")


def test_without_torch_the_extra_that_brings_it_is_named(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match="needs the package torch: install Trifold with the extra 'train'"):
        train(bundle, listen="127.0.0.1:0")


def test_serving_a_core_brings_no_torch() -> None:
    script = "import sys, trifold.cloud.core.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
