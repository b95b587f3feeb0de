"""GroupQueryAttention in a form that gives each row the same bits in every chunking.

ONNX Runtime computes attention by matrix products, whose last bits depend on their shape in two ways:
  - a product of one row takes another path than one of two or more, also when a tile of rows ends with one;
  - with heads wider than 128 the sum over a head is cut in two, unless there are at most 64 keys.
So the operator gets at least one row more than it is asked for, copies of the last one, and whoever runs the
graph (trifold.shared.runtime.shard) adds more of them while a wide head would have 64 keys or fewer. Their
keys lie behind all others, where nothing that counts can see them, and the next step overwrites them.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from trifold.cloud.split.graph.builder import FLOAT, MICROSOFT, Builder


@dataclass(frozen=True)
class Places:
    """The inputs of a graph that say where its rows stand.

    `attend` (rows + copies) picks the rows and the copies of the last; `rows` (1) counts without copies;
    `last` (1) is the position of the last copy, `total` () one more; `cos` and `sin` (positions, half)
    are the rotation. `positions` (1, rows), without copies, is there for latent attention.
    """

    attend: ir.Value
    rows: ir.Value
    last: ir.Value
    total: ir.Value
    cos: ir.Value
    sin: ir.Value
    positions: ir.Value | None

    @classmethod
    def inputs(cls, builder: Builder, half: int, *, latent: bool) -> Places:
        return cls(
            attend=builder.input("attend", ir.DataType.INT64, ["attended"]),
            rows=builder.input("row_count", ir.DataType.INT64, [1]),
            last=builder.input("last_position", ir.DataType.INT32, [1]),
            total=builder.input("position_count", ir.DataType.INT32, []),
            cos=builder.input("cos", FLOAT, ["positions", half]),
            sin=builder.input("sin", FLOAT, ["positions", half]),
            positions=builder.input("positions", ir.DataType.INT64, [1, "rows"]) if latent else None,
        )


@dataclass(frozen=True)
class Heads:
    """`query` heads over `key` heads of `size` values; the output is `value` of them, from `first` on.

    `latent`: keys are values, too, and rotated already.
    """

    query: int
    key: int
    size: int
    first: int
    value: int
    softmax_scale: float
    latent: bool


def attend(builder: Builder, qkv: ir.Value, layer: int, heads: Heads, places: Places) -> ir.Value:
    """Attention of qkv (rows, 1, (query + 2 · key) · size) over a layer's cache: (rows, 1, query · value)."""
    cache: list[int | str] = [1, heads.key, "slots", heads.size]
    width = (heads.query + 2 * heads.key) * heads.size
    kinds = ["latent"] if heads.latent else ["key", "value"]
    past = [builder.input(f"past_{kind}_{layer}", FLOAT, cache) for kind in kinds]
    out, *present = builder.op_of(
        3,
        "GroupQueryAttention",
        builder.op("Gather", builder.reshape(qkv, 1, -1, width), places.attend, axis=1),
        None,
        None,
        past[0],
        past[-1],
        places.last,
        places.total,
        *([] if heads.latent else [places.cos, places.sin]),
        domain=MICROSOFT,
        num_heads=heads.query,
        kv_num_heads=heads.key,
        do_rotary=int(not heads.latent),
        scale=heads.softmax_scale,
    )
    for kind, value in zip(("key", "value"), present, strict=True):
        builder.output(value, f"present_{kind}_{layer}", cache)
    by_head = builder.reshape(out, -1, heads.query, heads.size)
    stop = builder.op("Concat", places.rows, builder.ints(heads.first + heads.value), axis=0)
    rows = builder.op("Slice", by_head, builder.ints(0, heads.first), stop, builder.ints(0, 2))
    return builder.reshape(rows, -1, 1, heads.query * heads.value)
