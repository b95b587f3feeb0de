"""Quantities with units, as people write them in TOML: "16GB", "100Mbit/s", "20ms"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import inf
from typing import Annotated, Final

from pydantic import BeforeValidator

Units = Mapping[str, float]

_BYTES: Final[Units] = {
    "": 1,
    **{f"{prefix}B": 1000.0**power for power, prefix in enumerate(("", "k", "M", "G", "T"))},
    **{f"{prefix}iB": 1024.0**power for power, prefix in enumerate(("K", "M", "G", "T"), 1)},
}
_BITS: Final[Units] = {
    f"{prefix}{bit}": 1000.0**power / 8
    for power, prefix in enumerate(("", "k", "M", "G", "T"))
    for bit in ("bit", "bit/s", "bps")
}
_RATES: Final[Units] = {**_BYTES, **{f"{unit}/s": size for unit, size in _BYTES.items() if unit}, **_BITS}
_SECONDS: Final[Units] = {"": 1, "s": 1, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


def _quantity(units: Units, example: str, *, zero: bool = False) -> BeforeValidator:
    """Makes a number, or text of a number and one of the units, a float above 0 (or of at least 0)."""

    def parse(value: object) -> float:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            match = re.fullmatch(r"(-?\d*\.?\d+(?:[eE][-+]?\d+)?)\s*(\D*)", str(value).strip())
            if match and match[2] in units:
                number = float(match[1]) * units[match[2]]
                if 0 < number < inf or (zero and number == 0):
                    return number
        raise ValueError(f"{value!r} is not {example}")

    return BeforeValidator(parse)


Bytes = Annotated[float, _quantity(_BYTES, 'a size such as "16GB" or "512MiB"')]
BytesPerSecond = Annotated[float, _quantity(_RATES, 'a bandwidth such as "50GB/s" or "100Mbit/s"')]
PerSecond = Annotated[float, _quantity({"": 1}, "a number above 0 such as 2e12")]
Seconds = Annotated[float, _quantity(_SECONDS, 'a time such as "20ms", or a number of seconds', zero=True)]
