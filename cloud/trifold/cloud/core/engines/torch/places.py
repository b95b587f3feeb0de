"""Places: where the rows of a batch stand, and which tiles of queries meet which blocks of keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from math import gcd
from typing import Any, Final, Self

import torch
from torch import Tensor

from trifold.cloud.core.kv.blocks import BLOCK, NOBODYS, blocks_of

QUERIES: Final = 16
"""Rows of a prompt that attention takes together."""

_MOST_SCORES: Final = 2**24
"""Attention scores held at once: 64 MiB."""


@dataclass(frozen=True)
class Span:
    """Rows of one session in a batch: `rows` of them for the positions from `base_pos` on."""

    blocks: Sequence[int]
    base_pos: int
    rows: int


@dataclass(frozen=True)
class Tile:
    """Queries of one session that attention takes together: their places in the batch, and positions."""

    blocks: Sequence[int]
    rows: list[int]
    positions: list[int]


@dataclass(frozen=True)
class Device:
    """Tensors that go to a device together."""

    def to(self, device: torch.device) -> Self:
        moved = {name: self._moved(value, device) for name, value in self._values()}
        return replace(self, **moved)

    def copy_from(self, other: Self) -> None:
        """Takes the values of one of the same shapes, in the memory that is here."""
        for name, value in self._values():
            given = getattr(other, name)
            if isinstance(value, Tensor):
                value.copy_(given)
            elif isinstance(value, tuple):
                for mine, others in zip(value, given, strict=True):
                    mine.copy_from(others)

    def _values(self) -> Iterator[tuple[str, Any]]:
        return ((field.name, getattr(self, field.name)) for field in fields(self))

    @staticmethod
    def _moved(value: Any, device: torch.device) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        if isinstance(value, tuple):
            return tuple(one.to(device) for one in value)
        return value


@dataclass(frozen=True)
class Tiles(Device):
    """Tiles of equal size, those with most blocks first, and pairs of a tile and a block.

    Pairs are in order of blocks: of the first block of every tile, then of the second of those that have one,
    …; `counts` says how many pairs each of these steps has. So step c has the tiles [0, counts[c]).
    """

    rows: Tensor
    """(tiles, size): the row in the batch of every query; a tile that is not full has its last one again."""
    positions: Tensor
    """(tiles, size)"""
    tile: Tensor
    """(pairs)"""
    block: Tensor
    """(pairs)"""
    first: Tensor
    """(pairs): the position that the block begins with."""
    counts: list[int]


@dataclass(frozen=True)
class Places(Device):
    """Of every row in a batch: its position, and the block and the place in it that its key is written to.

    `order` has each row's place in what attention gives for all `tiles`, one after the other.
    """

    positions: Tensor
    block: Tensor
    offset: Tensor
    order: Tensor
    tiles: tuple[Tiles, ...]


def places(
    spans: Sequence[Span], *, multiple: int, heads: int, groups: int, apart: bool, least_blocks: int = 1
) -> Places:
    """Where the rows of some sessions stand.

    `heads` attend, `groups` of them to each key; so many queries of a tile are a `multiple`. Single rows have
    tiles of their own if `apart`. A tile has at least `least_blocks` blocks, if need be of nobody's.
    """
    single = multiple // gcd(multiple, groups)
    by_size: dict[int, list[Tile]] = {}
    positions: list[int] = []
    blocks: list[int] = []
    for span in spans:
        size = single if apart and span.rows == 1 else max(QUERIES, single)
        rows = [*range(len(positions), len(positions) + span.rows)]
        positions += range(span.base_pos, span.base_pos + span.rows)
        blocks += (span.blocks[positions[row] // BLOCK] for row in rows)
        for first in range(0, span.rows, size):
            queries = rows[first : first + size]
            tile = Tile(span.blocks, queries, [positions[row] for row in queries])
            by_size.setdefault(size, []).append(tile)
    grouped = [
        (size, part) for size, tiles in by_size.items() for part in _parts(tiles, size * heads, least_blocks)
    ]
    order = [0] * len(positions)
    start = 0
    for size, part in grouped:
        for tile in part:
            for at, row in enumerate(tile.rows, start):
                order[row] = at
            start += size
    return Places(
        positions=torch.tensor(positions),
        block=torch.tensor(blocks),
        offset=torch.tensor([position % BLOCK for position in positions]),
        order=torch.tensor(order),
        tiles=tuple(_tiles(part, size, least_blocks) for size, part in grouped),
    )


def _parts(tiles: list[Tile], scores: int, least: int) -> Iterator[list[Tile]]:
    """Tiles with most blocks first, cut where scores are too many: for a key, a tile has `scores`."""
    part: list[Tile] = []
    held = 0
    for tile in sorted(tiles, key=_blocks, reverse=True):
        needed = max(_blocks(tile), least) * BLOCK * scores
        if part and held + needed > _MOST_SCORES:
            yield part
            part, held = [], 0
        part.append(tile)
        held += needed
    yield part


def _blocks(tile: Tile) -> int:
    """How many it has to see."""
    return blocks_of(tile.positions[-1] + 1)


def _tiles(tiles: list[Tile], size: int, least: int) -> Tiles:
    seen = [max(_blocks(tile), least) for tile in tiles]
    counts = [sum(count > step for count in seen) for step in range(seen[0])]
    pairs = [(tile, step) for step, count in enumerate(counts) for tile in range(count)]
    known = [len(tile.blocks) for tile in tiles]
    return Tiles(
        rows=torch.tensor([_full(tile.rows, size) for tile in tiles]),
        positions=torch.tensor([_full(tile.positions, size) for tile in tiles]),
        tile=torch.tensor([tile for tile, _ in pairs]),
        block=torch.tensor([tiles[t].blocks[at] if at < known[t] else NOBODYS for t, at in pairs]),
        first=torch.tensor([at * BLOCK for _, at in pairs]),
        counts=counts,
    )


def _full(values: list[int], size: int) -> list[int]:
    return [*chain(values, [values[-1]] * (size - len(values)))]
