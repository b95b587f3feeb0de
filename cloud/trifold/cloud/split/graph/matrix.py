"""Matrix: a weight of a checkpoint, read in pieces of rows, so that no more than one piece is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trifold.shared.errors import DamagedFile
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.model.heads import BLANK, Order
from trifold.shared.model.names import DenseNames, MoeNames

Float = NDArray[np.float32]

PIECE: Final = 2 * 2**20
"""Values in a piece: 8 MiB of fp32."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that tells `read` how many values have been taken from it.

    Raises DamagedFile naming a tensor that holds values that are not finite.
    """

    checkpoint: Checkpoint
    read: Callable[[int], None] = lambda values: None

    def rows(self, name: str, start: int, stop: int) -> Float:
        values = self.checkpoint.rows(name, start, stop)
        if not (np.isfinite(values.min()) and np.isfinite(values.max())):
            raise DamagedFile(f"{self.checkpoint.path}: tensor {name} holds values that are not finite")
        self.read(values.size)
        return values

    def pieces(self, name: str) -> Iterator[Float]:
        """A whole tensor, in order."""
        shape = self.checkpoint.shape(name)
        step = max(1, PIECE // prod(shape[1:]))
        for start in range(0, shape[0], step):
            yield self.rows(name, start, min(start + step, shape[0]))

    def vector(self, name: str) -> Float:
        """A norm or a bias."""
        return self.rows(name, 0, self.checkpoint.shape(name)[0])


@dataclass(frozen=True)
class Matrix:
    """A weight (outputs, inputs). `pieces` yields its rows in order, as fp32 arrays (n, inputs)."""

    outputs: int
    inputs: int
    pieces: Callable[[], Iterator[Float]]


def whole(source: Source, name: str) -> Matrix:
    """A tensor of the checkpoint as it stands there."""
    outputs, inputs = source.checkpoint.shape(name)
    return Matrix(outputs, inputs, lambda: source.pieces(name))


def heads(source: Source, name: str, size: int, order: Order) -> Matrix:
    """A tensor of heads of `size` rows, each in another `order`, in which BLANK is a row of zeros."""
    outputs, inputs = source.checkpoint.shape(name)

    def pieces() -> Iterator[Float]:
        for start in range(0, outputs, size):
            yield reorder(source.rows(name, start, start + size), order)

    return Matrix(outputs // size * len(order), inputs, pieces)


def reorder(rows: Float, order: Order) -> Float:
    """Rows (or values) in another order, with zeros for BLANK."""
    blank = (order == BLANK).reshape(-1, *[1] * (rows.ndim - 1))
    return np.where(blank, np.float32(0), rows[order])


def vector_of_heads(values: Float, size: int, order: Order) -> Float:
    """A bias or norm over heads of `size` values, each in another order."""
    return np.concatenate([reorder(head, order) for head in values.reshape(-1, size)])


def stack(parts: Sequence[Matrix]) -> Matrix:
    """Weights of equal inputs as one, the outputs of the first part first."""

    def pieces() -> Iterator[Float]:
        for part in parts:
            yield from part.pieces()

    return Matrix(sum(part.outputs for part in parts), parts[0].inputs, pieces)


def experts_in(source: Source, names: MoeNames, experts: int, width: int, hidden: int) -> Matrix:
    """Gate and up of all experts, row by row in turn, with blank rows and columns up to `width`, `hidden`."""

    def expert(part: DenseNames) -> Float:
        block = np.zeros((width, 2, hidden), np.float32)
        for place, name in enumerate((part.gate, part.up)):
            rows, columns = source.checkpoint.shape(name)
            block[:rows, place, :columns] = source.rows(name, 0, rows)
        return block.reshape(2 * width, hidden)

    return Matrix(
        experts * 2 * width, hidden, lambda: (expert(names.expert(index)) for index in range(experts))
    )


def experts_out(source: Source, names: MoeNames, experts: int, width: int, hidden: int) -> Matrix:
    """Down of all experts, with blank rows and columns up to `hidden` and `width`."""

    def expert(part: DenseNames) -> Float:
        block = np.zeros((hidden, width), np.float32)
        rows, columns = source.checkpoint.shape(part.down)
        block[:rows, :columns] = source.rows(part.down, 0, rows)
        return block

    return Matrix(experts * hidden, width, lambda: (expert(names.expert(index)) for index in range(experts)))
