"""Engines by name, imported when they are chosen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trifold.cloud.core.engines.onnxruntime.engine import OnnxRuntimeEngine
from trifold.cloud.core.engines.registry import loader
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.errors import ConfigError
from trifold.shared.settings import CloudSettings


def test_without_a_word_about_it_the_engine_is_onnxruntime(bundle: Path) -> None:
    settings = CloudSettings(bundle=bundle, threads=1)
    engine = loader(settings)(TierFolder.open(bundle, "cloud"), progress=lambda done, total: None)
    assert isinstance(engine, OnnxRuntimeEngine)


def test_serving_with_onnxruntime_imports_no_torch() -> None:
    script = (
        "import sys; from trifold.cloud.core import command; "
        "from trifold.cloud.core.engines.registry import loader; "
        "from trifold.shared.settings import CloudSettings; loader(CloudSettings(bundle='b')); "
        "assert 'onnxruntime' in sys.modules; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_engine_whose_package_is_missing_is_refused_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.startswith("trifold.cloud.core.engines.torch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError) as refusal:
        loader(CloudSettings(bundle=Path("b"), engine="torch"))
    assert refusal.value.message == (
        "--engine torch needs the package torch, which is not installed: pip install 'trifold[torch]'"
    )


@pytest.mark.parametrize("engine", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize(("name", "value"), [("device", "cuda"), ("weights", "int8")])
def test_what_only_torch_can_follow_is_refused_for_others_and_not_forgotten(
    engine: str, name: str, value: str
) -> None:
    settings = CloudSettings.model_validate({"bundle": "b", "engine": engine, name: value})
    with pytest.raises(ConfigError, match=f"--{name} is {value}, which only --engine torch can follow"):
        loader(settings)


def test_an_engine_that_nobody_knows_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match="--engine is 'vllm': it must be 'onnxruntime', 'torch' or 'tensorrt'"
    ):
        CloudSettings.load(None, bundle="b", engine="vllm")


def test_tensorrt_where_it_is_not_installed_is_refused_with_what_to_install(bundle: Path) -> None:
    with pytest.raises(ConfigError, match="pip install 'tensorrt"):
        loader(CloudSettings(bundle=bundle, engine="tensorrt"))(
            TierFolder.open(bundle, "cloud"), progress=lambda done, total: None
        )
