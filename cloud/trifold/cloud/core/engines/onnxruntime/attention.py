"""Attention: for the rows of one session at a time, by each layer's own cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import onnxruntime as ort

from trifold.cloud.core.engines.onnxruntime.cut import Attention
from trifold.cloud.core.engines.onnxruntime.folded import Folded, Single
from trifold.shared.runtime.shard import COPIES, WIDE_POSITIONS, Rows, value_of

_ONE: Final = 1 + COPIES


class Cache:
    """Keys and values of the positions [0, have), with room for `capacity`; of an engine, for it alone."""

    def __init__(self, capacity: int, memory: list[list[Rows]]) -> None:
        """`memory` is of each layer's keys and values, or what is both, (1, heads, slots, size)."""
        self.capacity = capacity
        self.have = 0
        self.memory = memory
        self.past = [[value_of(kept) for kept in layer] for layer in memory]
        self.last_position = np.zeros(1, np.int32)
        self.position_count = np.zeros((), np.int32)
        self.singles: dict[int, ort.IOBinding] = {}
        """By layer, to be run again for one row."""
        self.folded: dict[int, Single] = {}
        """The same, where heads are folded."""

    def forget(self, base_pos: int) -> None:
        """What lies at that position and behind it."""
        if base_pos < self.have:
            # Folded heads give such rows no weight, but no weight times what is not finite is not 0.
            copied = max(self.have + COPIES, WIDE_POSITIONS)
            for latents, *values in self.memory:
                if not values:
                    latents[:, :, base_pos:copied] = 0
            self.have = base_pos

    def stand(self, last: int) -> None:
        """Says at what position the last row, or copy of it, of the calls that come stands."""
        self.last_position[0] = last
        self.position_count[...] = last + 1


class Call(NamedTuple):
    """Rows `start` to `stop` of a batch, which are of one session, and so many copies of the last of them.

    `last` is the position of the last copy.
    """

    cache: Cache
    start: int
    stop: int
    copies: int
    last: int


@dataclass(frozen=True)
class Space:
    """Where a call takes its rows from and leaves them: (1, rows, width)."""

    given: Rows
    got: Rows
    bound_given: ort.OrtValue
    bound_got: ort.OrtValue


class Attending:
    """What layers of equal graphs share: the session that runs it, and memory for calls."""

    def __init__(
        self,
        attention: Attention,
        session: ort.InferenceSession,
        most_rows: int,
        rotation: Mapping[str, ort.OrtValue],
        folded: Folded | None,
    ) -> None:
        """`rotation` is cos and sin, for all positions; `folded`, if any, takes the single rows."""
        self.attention = attention
        self.folded = folded
        self._rotation = rotation
        self._session = session
        self._in = (attention.query_heads + 2 * attention.key_heads) * attention.size
        self._out = attention.query_heads * attention.size
        self._given = np.empty(most_rows * self._in, np.float32)
        self._got = np.empty(most_rows * self._out, np.float32)
        self._spaces: dict[int, Space] = {}

    def run(self, layer: int, calls: Iterable[Call], qkv: Rows, out: Rows) -> None:
        """From qkv (rows, width) to out (rows, width), for all rows of a batch."""
        for call in calls:
            rows = call.stop - call.start
            cache, position = call.cache, call.last - call.copies
            if self.folded and rows == 1 and self.folded.takes(position):
                [latents] = cache.memory[layer]
                row = self.folded.run(
                    cache.folded.get(layer), latents[0, 0], position, qkv[call.start], out[call.start]
                )
                cache.folded[layer] = row
                continue
            space = self._spaces.get(rows + call.copies) or self._space(rows + call.copies)
            if rows == 1:
                space.given[...] = qkv[call.start]
            else:
                space.given[0, :rows] = qkv[call.start : call.stop]
                space.given[0, rows:] = qkv[call.stop - 1]
            call.cache.stand(call.last)
            self._session.run_with_iobinding(self._binding(layer, call, space))
            out[call.start : call.stop] = space.got[0, :rows]

    def _binding(self, layer: int, call: Call, space: Space) -> ort.IOBinding:
        if call.stop - call.start + call.copies != _ONE:
            return self._bind(layer, call.cache, space)
        binding = call.cache.singles.get(layer)
        if binding is None:
            binding = call.cache.singles[layer] = self._bind(layer, call.cache, space)
        return binding

    def _space(self, rows: int) -> Space:
        given = self._given[: rows * self._in].reshape(1, rows, -1)
        got = self._got[: rows * self._out].reshape(1, rows, -1)
        return self._spaces.setdefault(rows, Space(given, got, value_of(given), value_of(got)))

    def _bind(self, layer: int, cache: Cache, space: Space) -> ort.IOBinding:
        binding = self._session.io_binding()
        key, value = cache.past[layer][0], cache.past[layer][-1]
        values = {
            "qkv": space.bound_given,
            "key": key,
            "value": value,
            "last_position": value_of(cache.last_position),
            "position_count": value_of(cache.position_count),
            **self._rotation,
        }
        for name in self.attention.inputs:
            binding.bind_ortvalue_input(name, values[name])
        for name, bound in (("out", space.bound_got), ("present_key", key), ("present_value", value)):
            binding.bind_ortvalue_output(name, bound)
        return binding
