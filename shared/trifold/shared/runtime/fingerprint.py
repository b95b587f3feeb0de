"""What computes: two engines of one fingerprint give equal bits."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Final

import onnxruntime as ort

_TELLING: Final = (
    *("avx512_vnni", "avx512f", "avx_vnni", "amx_int8", "avx2", "fma"),
    *("asimddp", "i8mm", "sve", "sve2", "bf16", "sme"),
)
"""CPU flags that ONNX Runtime chooses kernels by."""


def fingerprint(provider: str, digest: str) -> str:
    """Engine, version, provider, instruction set, size of the L2 cache and digest of the self-test.

    The tiles of attention are as large as the L2 cache allows, and sums over other tiles have other last bits.
    """
    parts = [f"onnxruntime-{ort.__version__}", provider, _instructions(), f"l2-{_level_2_cache()}", digest]
    return "/".join(parts)


def _instructions() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    return "+".join([platform.machine(), *(flag for flag in _TELLING if flag in flags)])


def _level_2_cache() -> int:
    try:
        return max(0, os.sysconf("SC_LEVEL2_CACHE_SIZE"))
    except (OSError, ValueError):
        return 0
