"""TensorRT and CUDA, imported when an engine is wanted; both are optional."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from packaging.version import Version

from trifold.shared.errors import ConfigError

if TYPE_CHECKING:
    import tensorrt as trt

FIRST: Final = Version("10.15")
"""The first whose parser knows RMSNormalization, RotaryEmbedding and TensorScatter."""

INSTALL: Final = f"pip install 'tensorrt>={FIRST}' cuda-bindings"

_RUNTIMES: Final = ("tensorrt", "tensorrt_lean", "tensorrt_lean_bindings")
"""The lean runtime, which cannot build, comes with or without a package that renames it."""


def check_builder() -> None:
    """Raises ConfigError when the module tensorrt, with which engines are built, is missing or too old."""
    _checked(_found(("tensorrt",), "building an engine"))


def runtime_library() -> Any:
    """The module tensorrt, or the lean runtime where only that is. Raises ConfigError."""
    return _checked(_found(_RUNTIMES, "the engine tensorrt"))


def cuda() -> Any:
    """The module cuda.bindings.runtime. Raises ConfigError."""
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise ConfigError(f"the engine tensorrt needs cuda-bindings ({error}): {INSTALL}") from None


def logger(library: Any) -> trt.ILogger:
    """What TensorRT logs to: warnings and errors, on stderr."""
    made: trt.ILogger = library.Logger(library.Logger.WARNING)
    return made


def _found(names: tuple[str, ...], wanted: str) -> Any:
    """The first of these modules that is here."""
    reasons = []
    for name in names:
        try:
            module = import_module(name)
        except ImportError as error:
            reasons.append(str(error))
            continue
        if hasattr(module, "__version__"):
            return module
        reasons.append(f"of {name} only the type stubs are here")
    raise ConfigError(f"{wanted} needs TensorRT {FIRST} or later ({reasons[0]}): {INSTALL}")


def _checked(library: Any) -> Any:
    if Version(library.__version__) < FIRST:
        raise ConfigError(f"TensorRT {library.__version__} is too old for the core's graph: {INSTALL}")
    return library
