"""Rates: what a device reaches with torch, for shares of that."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Final

import torch

from trifold.cloud.core.engines.torch.builder import compute_dtype
from trifold.cloud.train.accelerator import find
from trifold.shared.settings import WeightFormat

_TRIES: Final = 20
_BYTES: Final = 2**30
_SIDE: Final = {"cpu": 2048, "cuda": 8192}

WIDTHS: Final[dict[WeightFormat, int]] = {"bf16": 2, "fp32": 4, "int8": 1}
"""Bytes of a weight."""


def read_rate(device: str) -> float:
    """Bytes a second that a sum reads from the device's memory."""
    numbers = torch.ones(_BYTES // 4, device=find(device))
    return _BYTES / _fastest(numbers.sum)


def matrix_rate(device: str, weights: WeightFormat) -> float:
    """Operations a second of a large product in the dtype that the engine computes with."""
    place = find(device)
    side = _SIDE[place.type]
    left, right = torch.randn(2, side, side, device=place).to(compute_dtype(weights, place))
    return 2 * side**3 / _fastest(lambda: left @ right)


def _fastest(work: Callable[[], torch.Tensor]) -> float:
    """Seconds; the first try warms up."""
    times = []
    for _ in range(1 + _TRIES):
        began = perf_counter()
        work().flatten()[0].item()  # waits for a GPU
        times.append(perf_counter() - began)
    return min(times[1:])
