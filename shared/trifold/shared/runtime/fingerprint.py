"""What computes: two engines of one fingerprint give equal bits."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Final

import trifold.shared.runtime.untold  # noqa: F401  # isort: skip - before onnxruntime

import onnxruntime as ort

_TELLING: Final = (
    *("avx512_vnni", "avx512f", "avx_vnni", "amx_int8", "avx2", "fma"),
    *("asimddp", "i8mm", "sve", "sve2", "bf16", "sme"),
)
"""CPU flags that ONNX Runtime chooses kernels by."""


ONNXRUNTIME: Final = f"onnxruntime-{ort.__version__}"


def fingerprint(provider: str, digest: str, *, engine: str = ONNXRUNTIME, processor: str = "") -> str:
    """Engine and version, provider, processor (this machine's by default), digest of the self-test."""
    return "/".join([engine, provider, processor or instructions(), digest])


def instructions() -> str:
    """The machine, and of its CPU's flags those that ONNX Runtime chooses kernels by."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    return "+".join([platform.machine(), *(flag for flag in _TELLING if flag in flags)])
