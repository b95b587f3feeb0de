"""Attention: for the rows of one session at a time, by each layer's own cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import onnxruntime as ort

from trifold.cloud.core.engines.onnxruntime.cut import Attention
from trifold.shared.runtime.shard import COPIES, Rows, value_of

_ONE: Final = 1 + COPIES


class Cache:
    """Keys and values of the positions [0, have), with room for `capacity`; of an engine, for it alone."""

    def __init__(
        self, capacity: int, past: list[tuple[ort.OrtValue, ort.OrtValue]], *rotation: ort.OrtValue
    ) -> None:
        """`past` has keys and values of every layer; `rotation` is cos and sin."""
        self.capacity = capacity
        self.have = 0
        self.past = past
        self.rotation = rotation
        self.last_position = np.zeros(1, np.int32)
        self.position_count = np.zeros((), np.int32)
        self.singles: dict[int, ort.IOBinding] = {}
        """By layer, to be run again for one row."""

    def stand(self, last: int) -> None:
        """Says at what position the last row, or copy of it, of the calls that come stands."""
        self.last_position[0] = last
        self.position_count[...] = last + 1


@dataclass(frozen=True)
class Space:
    """Where a call takes its rows from and leaves them: (1, rows, width)."""

    given: Rows
    got: Rows
    bound_given: ort.OrtValue
    bound_got: ort.OrtValue


class Attending:
    """What layers of equal graphs share: the session that runs it, and memory for calls."""

    def __init__(self, attention: Attention, session: ort.InferenceSession, most_rows: int) -> None:
        self.attention = attention
        self._session = session
        self._in = (attention.query_heads + 2 * attention.key_heads) * attention.size
        self._out = attention.query_heads * attention.size
        self._given = np.empty(most_rows * self._in, np.float32)
        self._got = np.empty(most_rows * self._out, np.float32)
        self._spaces: dict[int, Space] = {}

    def run(self, layer: int, cache: Cache, qkv: Rows, out: Rows, copies: int) -> None:
        """From qkv (n, width) to out (n, width); the last row is followed by so many copies of it."""
        rows = len(qkv) + copies
        space = self._spaces.get(rows) or self._space(rows)
        space.given[0, : len(qkv)] = qkv
        space.given[0, len(qkv) :] = qkv[-1]
        binding = cache.singles.get(layer) if rows == _ONE else None
        if binding is None:
            binding = self._bind(layer, cache, space)
            if rows == _ONE:
                cache.singles[layer] = binding
        self._session.run_with_iobinding(binding)
        out[...] = space.got[0, : len(qkv)]

    def _space(self, rows: int) -> Space:
        given = self._given[: rows * self._in].reshape(1, rows, -1)
        got = self._got[: rows * self._out].reshape(1, rows, -1)
        return self._spaces.setdefault(rows, Space(given, got, value_of(given), value_of(got)))

    def _bind(self, layer: int, cache: Cache, space: Space) -> ort.IOBinding:
        binding = self._session.io_binding()
        (key, value), (cos, sin) = cache.past[layer], cache.rotation
        values = {
            "qkv": space.bound_given,
            "key": key,
            "value": value,
            "last_position": value_of(cache.last_position),
            "position_count": value_of(cache.position_count),
            "cos": cos,
            "sin": sin,
        }
        for name, bound in values.items():
            binding.bind_ortvalue_input(name, bound)
        for name, bound in (("out", space.bound_got), ("present_key", key), ("present_value", value)):
            binding.bind_ortvalue_output(name, bound)
        return binding
