"""One safetensors file, read a tensor at a time.

The safetensors package cannot hand fp8 to numpy, so the header is read here: 8 bytes of length (little
endian), JSON, then the tensors back to back (https://github.com/huggingface/safetensors, section "Format").
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from trifold.shared.errors import DamagedFile

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
"""What weights are stored in. A file may hold others; those cannot be read."""

_FP8: Final = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_LONGEST_HEADER: Final = 100_000_000


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `start` and `stop` are bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """The header is read and checked when the object is made, the tensors when they are asked for.

    Raises DamagedFile, naming the file and where it applies the tensor, when the file is missing, cut short
    or inconsistent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = _entries(path)

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) of the first axis, in fp32. The dtype must be one of DTYPES."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        row = prod(entry.shape[1:]) * dtype.itemsize
        stored = self._bytes[entry.start + start * row : entry.start + stop * row]
        # A table is five times as fast as the cast of ml_dtypes.
        values = _FP8[stored] if entry.dtype == "F8_E4M3" else stored.view(dtype).astype(np.float32)
        return values.reshape(stop - start, *entry.shape[1:])

    @cached_property
    def _bytes(self) -> NDArray[np.uint8]:
        return np.asarray(np.memmap(self.path, np.uint8, "r"))


def _entries(path: Path) -> dict[str, Entry]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise DamagedFile(f"{path}: cut short, the header is not whole; fetch the file again")
            header = json.loads(file.read(length))
    except OSError as error:
        raise DamagedFile(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path}: the header is not JSON; this is no safetensors file") from error
    if not isinstance(header, dict):
        raise DamagedFile(f"{path}: the header is not a JSON object; this is no safetensors file")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    _check_extent(path, entries, 8 + length, size)
    return entries


def _entry(path: Path, name: str, value: Any, origin: int) -> Entry:
    try:
        dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        sound = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, start, stop))
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise DamagedFile(f"{path}: tensor {name}: the header entry makes no sense")
    if dtype in DTYPES and stop - start != prod(shape) * DTYPES[dtype].itemsize:
        raise DamagedFile(f"{path}: tensor {name}: {stop - start} bytes for {dtype} {list(shape)}")
    return Entry(dtype, shape, origin + start, origin + stop)


def _check_extent(path: Path, entries: dict[str, Entry], origin: int, size: int) -> None:
    """The tensors must follow one another without holes to the end of the file, as the format demands."""
    at = origin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at or entry.stop < at:
            raise DamagedFile(f"{path}: tensor {name} overlaps another or leaves a hole")
        if entry.stop > size:
            raise DamagedFile(f"{path}: cut short at byte {size}, tensor {name} ends at {entry.stop}")
        at = entry.stop
    if at != size:
        raise DamagedFile(f"{path}: {size - at} bytes follow the last tensor; fetch the file again")
