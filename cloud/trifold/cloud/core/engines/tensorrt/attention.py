"""Attention over caches that TensorRT updates in place, for a batch of sessions of different lengths.

A cache is an input (sessions, heads, slots, size) and an output at the same address: the parser makes of
TensorScatter a KVCacheUpdate layer, which asks for both, and for a fixed number of slots. A mask hides what
lies behind a row's own position, since the parser's Attention takes no lengths. So a row reads all slots, in
use or not.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from trifold.cloud.core.engines.tensorrt.operators import StandardBuilder
from trifold.shared.model.spec import Rope
from trifold.shared.runtime.rotation import rotation


@dataclass(frozen=True)
class Sessions:
    """The inputs that say where rows (sessions, rows, hidden) stand.

    `positions` (sessions, rows) are one after the other from `write_at` (sessions) on. `shape` (2) has the
    two counts; `seen` (sessions, 1, rows, slots) says what a row may see; `cos` and `sin` (slots, half).
    """

    positions: ir.Value
    write_at: ir.Value
    shape: ir.Value
    seen: ir.Value
    cos: ir.Value
    sin: ir.Value
    slots: int

    @classmethod
    def inputs(cls, builder: StandardBuilder, rope: Rope, slots: int) -> Sessions:
        positions = builder.input("positions", ir.DataType.INT64, ["sessions", "rows"])
        write_at = builder.input("write_at", ir.DataType.INT64, ["sessions"])
        keys = builder.reshape(builder.ints(*range(slots)), 1, 1, 1, slots)
        seen = builder.op("LessOrEqual", keys, builder.reshape(positions, 0, 1, -1, 1))
        cos, sin = (builder.tensor(table) for table in rotation(rope, slots))
        return cls(positions, write_at, builder.op("Shape", positions), seen, cos, sin, slots)


def by_head(builder: StandardBuilder, x: ir.Value, heads: int, sessions: Sessions) -> ir.Value:
    """From (sessions · rows, heads · size) to (sessions, rows, heads, size)."""
    shape = builder.op("Concat", sessions.shape, builder.ints(heads, -1), axis=0)
    return builder.op("Reshape", x, shape)


def turned(
    builder: StandardBuilder, x: ir.Value, rotated: int, sessions: Sessions, scale: float = 1.0
) -> ir.Value:
    """From (sessions, rows, heads, size) to low with heads second: `rotated` values turned, all scaled."""
    x = builder.op("Transpose", x, perm=[0, 2, 1, 3])
    tables = (sessions.cos, sessions.sin, sessions.positions)
    x = builder.op("RotaryEmbedding", x, *tables, rotary_embedding_dim=rotated)
    return builder.low(x if scale == 1 else builder.op("Mul", x, builder.scalar(scale)))


def kept(
    builder: StandardBuilder, low: ir.Value, name: str, heads: int, size: int, sessions: Sessions
) -> ir.Value:
    """The cache `name` with low (sessions, heads, rows, size) written to it."""
    shape: list[int | str] = ["sessions", heads, sessions.slots, size]
    past = builder.input(f"past_{name}", builder.computed, shape)
    present = builder.op("TensorScatter", past, low, sessions.write_at, axis=-2)
    builder.output(present, f"present_{name}", shape, builder.computed)
    return present


def attend(
    builder: StandardBuilder,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    heads: int,
    size: int,
    sessions: Sessions,
) -> ir.Value:
    """Low (sessions · rows, heads, size), of low keys, values and scaled queries with heads second."""
    # The parser multiplies queries and keys by the root of the scale: with another one, all slots of a cache.
    out = builder.op("Attention", query, key, value, sessions.seen, scale=1.0)
    return builder.reshape(builder.op("Transpose", out, perm=[0, 2, 1, 3]), -1, heads, size)
