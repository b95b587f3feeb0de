"""Flow: the memory that the rows of a batch pass through, from one graph to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from trifold.cloud.core.engines.onnxruntime.cut import Between
from trifold.shared.runtime.shard import Rows, value_of


class Flow:
    """The values between graphs for batches of `rows` rows, and the bindings to run each graph on them."""

    def __init__(
        self,
        rows: int,
        memory: Mapping[str, Rows],
        shapes: Mapping[str, tuple[int, ...]],
        graphs: Iterable[tuple[ort.InferenceSession, Between]],
        rotation: Mapping[str, ort.OrtValue],
    ) -> None:
        """`memory` is for each value flat and at least so large; its shape has -1 for the rows."""
        self.positions = np.zeros(rows, np.int64)
        self.values: dict[str, NDArray[Any]] = {
            "row_count": np.array([rows]),
            "positions": self.positions[None],
        }
        for name, shape in shapes.items():
            shape = tuple(rows if size < 0 else size for size in shape)
            self.values[name] = memory[name][: prod(shape)].reshape(shape)
        bound = {name: value_of(array) for name, array in self.values.items()} | dict(rotation)
        self.bindings = [_binding(session, between, bound) for session, between in graphs]

    def rows(self, name: str) -> Rows:
        """A value by its rows, (rows, width)."""
        count = len(self.values["rows"])
        return self.values[name].reshape(count, -1)


def _binding(
    session: ort.InferenceSession, between: Between, bound: Mapping[str, ort.OrtValue]
) -> ort.IOBinding:
    binding = session.io_binding()
    for name in between.inputs:
        binding.bind_ortvalue_input(name, bound[name])
    for name in between.outputs:
        binding.bind_ortvalue_output(name, bound[name])
    return binding


def shapes_of(
    graphs: Sequence[tuple[ort.InferenceSession, Between]],
    attended: Mapping[str, tuple[int, ...]],
    hidden: int,
    rotation: Mapping[str, Rows],
) -> dict[str, tuple[int, ...]]:
    """The shape of every value between the graphs, -1 for its rows, as two small batches show them.

    `attended` has those that attention gives.
    """
    shapes: dict[str, tuple[int, ...]] = {"rows": (-1, 1, hidden), **attended}
    for session, between in graphs:
        told = [_outputs(session, between, shapes, rows, rotation) for rows in (2, 3)]
        for name, two, three in zip(between.outputs, *told, strict=True):
            pairs = zip(two.shape, three.shape, strict=True)
            shapes[name] = tuple(size if size == other else -1 for size, other in pairs)
    return shapes


def _outputs(
    session: ort.InferenceSession,
    between: Between,
    shapes: Mapping[str, tuple[int, ...]],
    rows: int,
    rotation: Mapping[str, Rows],
) -> list[NDArray[Any]]:
    """What a graph makes of so many rows of zeros."""
    given: dict[str, NDArray[Any]] = {
        "row_count": np.array([rows]),
        "positions": np.zeros((1, rows), np.int64),
        **rotation,
    }
    for name in between.inputs:
        if name in shapes:
            given[name] = np.zeros([rows if size < 0 else size for size in shapes[name]], np.float32)
    outputs: list[NDArray[Any]] = session.run(between.outputs, {name: given[name] for name in between.inputs})
    return outputs
