"""Engines by name; what one needs is imported when it is chosen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from trifold.cloud.core.engines.engine import Engine
from trifold.shared.errors import ConfigError
from trifold.shared.session.startup import Load
from trifold.shared.settings import CloudSettings

Loader = Load[Engine[Any]]


def loader(settings: CloudSettings) -> Loader:
    """What loads the engine of the settings.

    Raises ConfigError where a package is missing, or for a setting that the engine cannot follow.
    """
    for name in {"device", "weights"} & settings.model_fields_set if settings.engine != "torch" else ():
        if getattr(settings, name) != CloudSettings.model_fields[name].default:
            told = f"--{name} is {getattr(settings, name)}, which only --engine torch can follow"
            raise ConfigError(f"{told}: give that, or leave it out")
    try:
        return _ENGINES[settings.engine](settings)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "trifold":
            raise
        raise ConfigError(
            f"--engine {settings.engine} needs the package {package}, which is not installed: "
            f"pip install 'trifold[{_EXTRAS[settings.engine]}]'"
        ) from error


def _onnxruntime(settings: CloudSettings) -> Loader:
    from trifold.cloud.core.engines.onnxruntime.engine import OnnxRuntimeEngine

    return partial(OnnxRuntimeEngine.load, threads=settings.threads)


def _torch(settings: CloudSettings) -> Loader:
    from trifold.cloud.core.engines.torch.engine import TorchEngine

    return partial(
        TorchEngine.load,
        device=settings.device,
        weights=settings.weights,
        memory=settings.kv_memory,
        threads=settings.threads,
    )


def _tensorrt(settings: CloudSettings) -> Loader:
    from trifold.cloud.core.engines.tensorrt.engine import TensorRtEngine

    return partial(TensorRtEngine.load, memory=settings.kv_memory)


_ENGINES: Final[dict[str, Callable[[CloudSettings], Loader]]] = {
    "onnxruntime": _onnxruntime,
    "torch": _torch,
    "tensorrt": _tensorrt,
}

_EXTRAS: Final = {"onnxruntime": "cloud", "torch": "torch", "tensorrt": "tensorrt"}
"""What of trifold brings an engine's packages."""
