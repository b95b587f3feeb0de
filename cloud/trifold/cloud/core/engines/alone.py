"""Alone: an engine in the form of a shard, for one session after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from trifold.cloud.core.engines.engine import Engine, Part
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.runtime.shard import Rows
from trifold.shared.session.startup import Load


class Alone:
    """What the monolith takes in place of the cloud's shard. A new cache ends the one before."""

    def __init__(self, engine: Engine[Any]) -> None:
        self.fingerprint = engine.fingerprint
        self.exact = engine.exact
        self._engine = engine
        self._cache: Any = None

    @classmethod
    def loader(cls, load: Load[Engine[Any]]) -> Callable[[TierFolder], Alone]:
        """What loads an engine in this form; nobody is told how far it is."""
        return lambda folder: cls(load(folder, progress=lambda done, total: None))

    def cache(self, capacity: int) -> Any:
        """An empty cache for the positions [0, capacity)."""
        if self._cache is not None:
            self._engine.release(self._cache)
        self._cache = self._engine.cache(capacity)
        return self._cache

    def run(self, cache: Any, inputs: Rows, base_pos: int) -> Rows:
        """The rows (n, hidden) behind the core's layers, of those for the positions from `base_pos` on."""
        size = self._engine.most_rows
        parts = [
            Part(cache, np.ascontiguousarray(inputs[start : start + size]), base_pos + start)
            for start in range(0, len(inputs), size)
        ]
        return np.concatenate([self._engine.run([part])[0] for part in parts])
