"""Engines by name; what one needs is imported when it is chosen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from trifold.cloud.core.engines.engine import Engine
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.errors import ConfigError
from trifold.shared.settings import CloudSettings

Load = Callable[[TierFolder], Engine[Any]]
"""Makes the engine of a folder, proved."""

Tell = Callable[[str], None]
"""Hears how far it is."""


def loader(settings: CloudSettings, tell: Tell) -> Load:
    """What loads the engine of the settings.

    Raises ConfigError where a package is missing, or for a device that the engine does not compute on.
    """
    if settings.engine == "onnxruntime" and settings.device != "cpu":
        raise ConfigError(
            f"--engine onnxruntime computes on the CPU, --device is {settings.device}: give --engine torch"
        )
    try:
        return _ENGINES[settings.engine](settings, tell)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "trifold":
            raise
        raise ConfigError(
            f"--engine {settings.engine} needs the package {package}, which is not installed: "
            f"pip install 'trifold[{_EXTRAS[settings.engine]}]'"
        ) from error


def _onnxruntime(settings: CloudSettings, tell: Tell) -> Load:
    from trifold.cloud.core.engines.onnxruntime.engine import OnnxRuntimeEngine

    return partial(OnnxRuntimeEngine.load, threads=settings.threads)


def _torch(settings: CloudSettings, tell: Tell) -> Load:
    from trifold.cloud.core.engines.torch.engine import TorchEngine

    return partial(
        TorchEngine.load,
        device=settings.device,
        weights=settings.weights,
        memory=settings.kv_memory,
        threads=settings.threads,
        tell=tell,
    )


_ENGINES: Final[dict[str, Callable[[CloudSettings, Tell], Load]]] = {
    "onnxruntime": _onnxruntime,
    "torch": _torch,
}

_EXTRAS: Final = {"onnxruntime": "cloud", "torch": "torch"}
"""What of trifold brings an engine's packages."""
