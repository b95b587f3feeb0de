"""How fast an engine computes the core: steps of many sessions, and prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any, Final

import numpy as np

from trifold.cloud.core.engines.engine import Engine, Part
from trifold.cloud.split.footprint import FLOAT, Footprint, footprint_of_layer
from trifold.shared.bundle.manifest import Manifest
from trifold.shared.model.spec import Layer, MoeFfn
from trifold.shared.runtime.shard import Rows

TURNS: Final = 5
SECONDS: Final = 0.5
"""Of steps of one kind in one turn, at least."""
_MANY: Final = 4096
"""Positions, beside which those that a cache is rounded up by are few."""


@dataclass(frozen=True)
class Speed:
    """Of one kind of batch: its rows, the seconds it takes, what it reads from memory and computes."""

    rows: int
    seconds: float
    read_bytes: float
    flops: float

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.seconds


@dataclass(frozen=True)
class Core:
    """The engine of a bundle's cloud tier, and what its layers cost."""

    engine: Engine[Any]
    manifest: Manifest
    width: float | None
    """Bytes of a weight; None stands for the bundle's own quantization."""
    context: int
    """Positions that a session holds before the rows that are timed."""

    def decode(self, sessions: Sequence[int]) -> dict[int, Speed]:
        """One row of each of so many sessions at a time: the median of several turns, each with all kinds."""
        caches = [self._session() for _ in range(max(sessions))]
        rows = [self._rows(1, seed=number) for number in range(max(sessions))]
        turns: dict[int, list[float]] = {count: [] for count in sessions}
        for _ in range(TURNS):
            for count, times in turns.items():
                pairs = zip(caches[:count], rows[:count], strict=True)
                batch = [Part(cache, row, self.context) for cache, row in pairs]
                times.append(self._seconds(batch))
        for cache in caches:
            self.engine.release(cache)
        return {count: self._speed(count, 1, self.context, median(times)) for count, times in turns.items()}

    def prefill(self, rows: int) -> Speed:
        """A prompt of so many rows, in batches of as many as the engine takes."""
        cache, text = self.engine.cache(rows), self._rows(rows)
        pieces = range(0, rows, self.engine.most_rows)
        times = []
        for _ in range(1 + TURNS):
            began = perf_counter()
            for start in pieces:
                self.engine.run([Part(cache, text[start : start + self.engine.most_rows], start)])
            times.append(perf_counter() - began)
        self.engine.release(cache)
        return self._speed(1, rows, 0, median(times[1:]))

    def _session(self) -> Any:
        cache = self.engine.cache(self.context + 1)
        text = self._rows(self.context)
        for start in range(0, self.context, self.engine.most_rows):
            self.engine.run([Part(cache, text[start : start + self.engine.most_rows], start)])
        return cache

    def _rows(self, count: int, seed: int = 0) -> Rows:
        return np.random.default_rng(seed).standard_normal((count, self.engine.hidden), np.float32)

    def _seconds(self, batch: Sequence[Part[Any]]) -> float:
        """Of one such step, which comes again and again."""
        times: list[float] = []
        end = perf_counter() + SECONDS
        while not times or perf_counter() < end:
            began = perf_counter()
            self.engine.run(batch)
            times.append(perf_counter() - began)
        return median(times)

    def _speed(self, sessions: int, rows: int, held: int, seconds: float) -> Speed:
        """Of `rows` rows of each session, behind the positions that it held; they see half of each other."""
        seen = held + rows / 2
        flops, read = 0.0, sessions * self._kv_bytes() * (held + rows)
        for layer, cost in self._layers():
            read += cost.weight_bytes - _unvisited(layer, cost, sessions * rows)
            flops += sessions * rows * (cost.flops + cost.position_flops * seen)
        return Speed(sessions * rows, seconds, read, flops)

    def _layers(self) -> Iterator[tuple[Layer, Footprint]]:
        serving = self.manifest.serving
        for index in serving.cuts.layers("cloud", len(serving.spec.layers)):
            quantization = serving.quantization if self.width is None else "none"
            cost = footprint_of_layer(serving.spec, index, quantization)
            if self.width is not None:
                part = self.width / FLOAT
                cost = replace(
                    cost, weight_bytes=int(part * cost.weight_bytes), read_bytes=int(part * cost.read_bytes)
                )
            yield serving.spec.layers[index], cost

    def _kv_bytes(self) -> float:
        """Of a position, in the engine's own form."""
        return self.engine.cache_bytes(_MANY) / _MANY


def _unvisited(layer: Layer, cost: Footprint, rows: int) -> float:
    """Bytes of the experts that none of so many rows visits, were each to choose by chance."""
    if not isinstance(layer.ffn, MoeFfn):
        return 0.0
    idle = 1 - layer.ffn.top_k / layer.ffn.experts
    # What one row leaves idle are all experts but those of its own.
    return (cost.weight_bytes - cost.read_bytes) / idle * idle**rows if idle else 0.0
