"""The core on ONNX Runtime: projections and experts over all rows of a batch, attention per session."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from math import prod
from typing import Final

import trifold.shared.runtime.untold  # noqa: F401  # isort: skip - before onnxruntime

import numpy as np

from trifold.cloud.core.batching import BUDGET
from trifold.cloud.core.engines.engine import Part, check
from trifold.cloud.core.engines.onnxruntime.attention import Attending, Cache, Call
from trifold.cloud.core.engines.onnxruntime.cut import cut
from trifold.cloud.core.engines.onnxruntime.flow import Flow, shapes_of
from trifold.cloud.core.engines.onnxruntime.folded import Folded, folded
from trifold.cloud.core.kv.blocks import BLOCK
from trifold.shared.bundle.folder import Progress, TierFolder
from trifold.shared.bundle.manifest import Tier
from trifold.shared.errors import TrifoldError
from trifold.shared.runtime.engine import PROVIDER, WEIGHTS, load
from trifold.shared.runtime.fingerprint import fingerprint
from trifold.shared.runtime.rotation import rotation
from trifold.shared.runtime.selftest import SelfTest, prove, some_rows
from trifold.shared.runtime.shard import (
    COPIES,
    MODEL,
    MOST_SCORES,
    WIDE_HEAD,
    WIDE_POSITIONS,
    Rows,
    value_of,
)

_log: Final = logging.getLogger(__name__)

_LOADED_AT_ONCE: Final = 4
"""Graphs, as ONNX Runtime packs the weights of each on one thread."""


class OnnxRuntimeEngine:
    """The shard of the cloud. A row gets the bits that trifold.shared.runtime.shard would give it."""

    tier: Tier = "cloud"
    provider = PROVIDER
    most_rows = 512

    def __init__(
        self, folder: TierFolder, *, threads: int = 0, progress: Progress = lambda done, total: None
    ) -> None:
        """On `threads` threads, or on one for each physical core (0); loads on as many, but few.

        `progress` hears of the weights checked, and then of those loaded. Raises DamagedFile.
        """
        spec = folder.manifest.serving.spec
        self.hidden = spec.hidden
        self.fingerprint = ""
        self.exact = False
        betweens, attentions = cut(folder.read(MODEL))
        # Of no more graphs at a time are weights in memory twice, as read and as packed.
        loaders = min(_LOADED_AT_ONCE, threads or len(os.sched_getaffinity(0)))
        with folder.mapped(WEIGHTS, progress) as weights, ThreadPoolExecutor(loaders) as loading:
            sessions = loading.map(lambda one: load(one.model, weights, threads=threads), betweens)
            self._graphs = []
            for session, between in zip(sessions, betweens, strict=True):
                self._graphs.append((session, between))
                progress(len(weights) * len(self._graphs) // len(betweens), len(weights))
        wide = any(attention.size > WIDE_HEAD for attention in attentions)
        self._fewest_positions = WIDE_POSITIONS if wide else 0
        self._query_heads = max(attention.query_heads for attention in attentions)
        self._latent = any(attention.caches == 1 for attention in attentions)
        most = self.most_rows + max(COPIES, self._fewest_positions)
        # The operator takes the rows of a batch for a sequence, of which a table must not have fewer.
        positions = max(self._slots(spec.max_positions), self.most_rows)
        tables = dict(zip(("cos", "sin"), rotation(spec.rope, positions), strict=True))
        self._rotation = {name: value_of(table) for name, table in tables.items()}
        shared = {
            attention.model: Attending(
                attention,
                load(attention.model, b"", threads=threads),
                most,
                self._rotation,
                folded(attention, threads),
            )
            for attention in attentions
        }
        self._attending = [shared[attention.model] for attention in attentions]
        self._crossings = [(attention.qkv, attention.out) for attention in attentions]
        attended = {
            attention.out: (1, -1, attention.query_heads * attention.size) for attention in attentions
        }
        self._shapes = shapes_of(self._graphs, attended, self.hidden, tables)
        self._memory = {
            name: np.zeros(self.most_rows * prod(size for size in shape if size > 0), np.float32)
            for name, shape in self._shapes.items()
        }
        self._flows: dict[int, Flow] = {}

    @classmethod
    def load(
        cls, folder: TierFolder, *, threads: int = 0, progress: Progress = lambda done, total: None
    ) -> OnnxRuntimeEngine:
        """The engine of a folder, proved. Raises DamagedFile."""
        engine = cls(folder, threads=threads, progress=progress)
        rows = some_rows(engine.hidden, folder.manifest.serving.spec.max_positions)
        result = engine._prove(rows)
        if not result.exact and engine._fold(1):
            result = engine._prove(rows)
        if not result.exact and engine._fold(0):
            _log.warning("folded heads give other bits on this machine: attention goes on without, slower")
            result = engine._prove(rows)
        engine.exact = result.exact
        engine.fingerprint = fingerprint(engine.provider, result.digest)
        return engine

    def _fold(self, step: int) -> bool:
        """Whether heads are folded: from now on in spans that grow by `step` positions, or (0) not at all."""
        for attending in self._attending:
            if attending.folded:
                attending.folded.step = step
        return self._latent

    def _prove(self, rows: Rows) -> SelfTest:
        return prove(
            rows, self.cache, lambda parts: self.run([Part(*part) for part in parts]), together=BUDGET
        )

    def cache_bytes(self, capacity: int) -> int:
        """Memory of a cache for so many positions."""
        layers = (one.attention for one in self._attending)
        values = sum(layer.caches * layer.key_heads * layer.size for layer in layers)
        return 4 * self._slots(capacity) * values

    def cache(self, capacity: int) -> Cache:
        """An empty cache for the positions [0, capacity)."""
        slots = self._slots(capacity)
        layers = (one.attention for one in self._attending)
        return Cache(
            capacity,
            [
                [np.zeros((1, layer.key_heads, slots, layer.size), np.float32) for _ in range(layer.caches)]
                for layer in layers
            ],
        )

    def release(self, cache: Cache) -> None:
        """Nothing has to be done: a cache's memory goes with it."""

    def run(self, batch: Sequence[Part[Cache]]) -> list[Rows]:
        """As Engine.run()."""
        for part in batch:
            check(part, self.hidden)
        for part in batch:
            part.cache.forget(part.base_pos)
        starts = [*accumulate((len(part.rows) for part in batch), initial=0)]
        flow = self._flow(starts[-1])
        np.concatenate([part.rows for part in batch], out=flow.rows("rows"))
        for part, start in zip(batch if self._latent else (), starts, strict=False):
            end = start + len(part.rows)
            flow.positions[start:end] = np.arange(part.base_pos, part.base_pos + len(part.rows))
        calls = [
            call for part, start in zip(batch, starts, strict=False) for call in self._calls(part, start)
        ]
        try:
            for number, (session, _) in enumerate(self._graphs):
                session.run_with_iobinding(flow.bindings[number])
                if number < len(self._attending):
                    qkv, out = (flow.rows(name) for name in self._crossings[number])
                    self._attending[number].run(number, calls, qkv, out)
        except Exception as error:
            raise TrifoldError(f"the core failed at a batch of {starts[-1]} rows: {error}") from error
        for part in batch:
            part.cache.have = part.base_pos + len(part.rows)
        out = flow.rows("rows_out")
        return [out[start:stop].copy() for start, stop in pairwise(starts)]

    def copy_block(self, cache: Cache, number: int) -> list[Rows]:
        """As Copying.copy_block()."""
        at = slice(number * BLOCK, (number + 1) * BLOCK)
        return [kept[:, :, at].copy() for layer in cache.memory for kept in layer]

    def paste_block(self, cache: Cache, number: int, block: list[Rows]) -> None:
        """As Copying.paste_block()."""
        at = slice(number * BLOCK, (number + 1) * BLOCK)
        kept = (kept for layer in cache.memory for kept in layer)
        for place, values in zip(kept, block, strict=True):
            place[:, :, at] = values
        cache.have = (number + 1) * BLOCK

    def _calls(self, part: Part[Cache], first: int) -> Iterator[Call]:
        """Of attention to the rows of a part, which begin at `first` in the batch.

        They are cut, which changes no bits, where scores of all heads, rows and slots are too many.
        """
        step = max(1, MOST_SCORES // (self._query_heads * self._slots(part.cache.capacity)))
        for start in range(0, len(part.rows), step):
            stop = min(start + step, len(part.rows))
            end = part.base_pos + stop
            copies = max(COPIES, self._fewest_positions - end)
            yield Call(part.cache, first + start, first + stop, copies, end + copies - 1)

    def _flow(self, rows: int) -> Flow:
        flow = self._flows.get(rows)
        if flow is None:
            flow = self._flows[rows] = Flow(rows, self._memory, self._shapes, self._graphs, self._rotation)
        return flow

    def _slots(self, capacity: int) -> int:
        """Positions that a cache has memory for: copies of the last row go behind it."""
        spans = Folded.slots(capacity) if self._latent else 0
        return max(capacity + COPIES, self._fewest_positions, spans)
