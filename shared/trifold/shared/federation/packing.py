"""An update as one buffer: fp32, or int8 in groups of 64 with fp16 scales, or that with 2 of 4 values kept.

    magic (4) | kind (1) | 0 (3) | values (8) | layout (16) | peak (4) | arrays, in the order of their names

`layout` is a digest of all names and shapes: the receiver knows them, and checks that the sender means the
same before it allocates anything. An array in int8 is its scales, one per group of 64 of its values (the last
may be shorter), then its values. Scales are fractions of `peak`, the largest of the buffer, so that fp16 does
for updates of any size. Little endian.

The 2:4 pattern (arXiv 2104.08378) keeps the two largest of every four values: a byte each, and 4 bits that
say where they stand.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from math import ceil, prod
from typing import Any, Final, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from trifold.shared.errors import InvalidRequest

Arrays = dict[str, NDArray[np.float32]]
Shapes = Mapping[str, tuple[int, ...]]
Kind = Literal["fp32", "int8", "int8-2:4"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

GROUP: Final = 64

T = TypeVar("T", bound=np.generic)

_HEADER: Final = struct.Struct("<4sB3xQ16sf")
_MAGIC: Final = b"TFU1"


def shapes_of(arrays: Mapping[str, NDArray[np.float32]]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def size(shapes: Shapes, kind: Kind) -> int:
    """Bytes of a packed update."""
    return _HEADER.size + sum(_array_size(prod(shape), kind) for shape in shapes.values())


def pack(update: Mapping[str, NDArray[np.float32]], kind: Kind) -> bytes:
    """The buffer of an update. Raises InvalidRequest for values that are not finite."""
    flat = [np.ascontiguousarray(update[name], "<f4").reshape(-1) for name in sorted(update)]
    if not all(np.isfinite(values).all() for values in flat):
        raise InvalidRequest("the update holds values that are not finite: the training has diverged")
    largest = max((float(np.abs(values).max(initial=0)) for values in flat), default=0.0)
    peak = float(np.float32(largest / 127)) or 1.0
    count = sum(values.size for values in flat)
    header = _HEADER.pack(_MAGIC, KINDS.index(kind), count, _layout(shapes_of(update)), peak)
    return header + b"".join(_encode(values, kind, peak) for values in flat)


def unpack(data: bytes, shapes: Shapes, kind: Kind) -> Arrays:
    """The arrays of a buffer that must be of `shapes` and `kind`; their values may be anything, even NaN.

    Raises InvalidRequest saying what the buffer is instead.
    """
    if len(data) < _HEADER.size:
        raise InvalidRequest(f"{len(data)} bytes are no update: its header alone has {_HEADER.size}")
    magic, number, count, layout, peak = _HEADER.unpack_from(data)
    if magic != _MAGIC or number >= len(KINDS):
        raise InvalidRequest("the bytes are no update of this version of Trifold")
    if KINDS[number] != kind:
        raise InvalidRequest(f"the dtype is {KINDS[number]}, agreed was {kind}")
    wanted = sum(prod(shape) for shape in shapes.values())
    if count != wanted:
        raise InvalidRequest(f"the update claims {count} values, the adapter has {wanted}")
    if layout != _layout(shapes):
        raise InvalidRequest("the names or shapes of the update are not those of the adapter")
    if len(data) != size(shapes, kind):
        raise InvalidRequest(f"the update has {len(data)} bytes instead of {size(shapes, kind)}")
    arrays, start = {}, _HEADER.size
    for name in sorted(shapes):
        end = start + _array_size(prod(shapes[name]), kind)
        arrays[name] = _decode(data[start:end], prod(shapes[name]), kind, peak).reshape(shapes[name])
        start = end
    return arrays


def _layout(shapes: Shapes) -> bytes:
    text = "".join(f"{name} {tuple(shapes[name])}\n" for name in sorted(shapes))
    return hashlib.sha256(text.encode()).digest()[:16]


def _array_size(count: int, kind: Kind) -> int:
    scales = 2 * ceil(count / GROUP)
    match kind:
        case "fp32":
            return 4 * count
        case "int8":
            return scales + count
        case "int8-2:4":
            quads = ceil(count / 4)
            return scales + 2 * quads + ceil(quads / 2)


def _encode(values: NDArray[np.float32], kind: Kind, peak: float) -> bytes:
    if kind == "fp32":
        return values.tobytes()
    if kind == "int8-2:4":
        values, places = _sparse(values)
    groups = _padded(values, GROUP)
    scales = (np.abs(groups).max(axis=1) / np.float32(127) / np.float32(peak)).astype("<f2")
    # The scale that is sent is rounded, so the largest value of a group may come out above 127.
    steps = scales.astype(np.float32)[:, None] * np.float32(peak)
    quotients = np.divide(groups, steps, out=np.zeros_like(groups), where=steps > 0)
    whole = np.rint(np.clip(quotients, -127, 127)).astype(np.int8).reshape(-1)[: values.size]
    parts: list[NDArray[Any]] = [scales, whole]
    if kind == "int8-2:4":
        kept = whole.reshape(-1, 4)[np.arange(len(places))[:, None], places]
        nibbles = _padded((places[:, 0] | places[:, 1] << 2).astype(np.uint8), 2)
        parts = [scales, kept, nibbles[:, 0] | nibbles[:, 1] << 4]
    return b"".join(part.tobytes() for part in parts)


def _decode(data: bytes, count: int, kind: Kind, peak: float) -> NDArray[np.float32]:
    if kind == "fp32":
        return np.frombuffer(data, "<f4").astype(np.float32)
    groups = ceil(count / GROUP)
    scales = np.frombuffer(data, "<f2", groups).astype(np.float32)
    body = memoryview(data)[2 * groups :]
    values = np.frombuffer(body, np.int8) if kind == "int8" else _dense(body, count)
    with np.errstate(over="ignore", invalid="ignore"):
        steps = scales[:, None] * np.float32(peak)
        return (_padded(values.astype(np.float32), GROUP) * steps).reshape(-1)[:count]


def _sparse(values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """The values with two of every four set to 0, padded to fours, and where (quads, 2) the others stand."""
    quads = _padded(values, 4)
    places = np.sort(np.argsort(-np.abs(quads), axis=1, kind="stable")[:, :2], axis=1)
    kept = np.zeros_like(quads)
    np.put_along_axis(kept, places, np.take_along_axis(quads, places, axis=1), axis=1)
    return kept.reshape(-1), places


def _dense(body: memoryview, count: int) -> NDArray[np.int8]:
    """The `count` values (int8) of a 2:4 body, zeros among them."""
    quads = ceil(count / 4)
    kept = np.frombuffer(body, np.int8, 2 * quads).reshape(quads, 2)
    packed = np.frombuffer(body, np.uint8, offset=2 * quads)
    nibbles = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[:quads]
    values = np.zeros((quads, 4), np.int8)
    row = np.arange(quads)
    values[row, nibbles & 3] = kept[:, 0]
    values[row, nibbles >> 2] = kept[:, 1]
    return values.reshape(-1)[:count]


def _padded(values: NDArray[T], width: int) -> NDArray[T]:
    """The values in rows of `width`, zeros behind the last."""
    return np.pad(values, (0, -values.size % width)).reshape(-1, width)
