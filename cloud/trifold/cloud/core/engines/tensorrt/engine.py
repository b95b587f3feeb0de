"""The core on TensorRT: the float weights of a bundle, in caches of one size for a fixed number of sessions.

No row touches the caches of another session, but whether it gets the same bits in every batch hangs on the
kernels that TensorRT chose: the self-test finds out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import numpy as np

from trifold.cloud.core.engines.engine import Part, check
from trifold.cloud.core.engines.tensorrt.build import build
from trifold.cloud.core.engines.tensorrt.device import Device
from trifold.cloud.core.engines.tensorrt.floats import check_floats
from trifold.cloud.core.engines.tensorrt.library import runtime_library
from trifold.cloud.core.engines.tensorrt.plans import Key, Plans
from trifold.cloud.core.engines.tensorrt.precision import NEEDS, Precision
from trifold.cloud.core.engines.tensorrt.profiles import Limits, padded
from trifold.cloud.core.engines.tensorrt.runner import GpuRunner, Runner
from trifold.cloud.core.engines.tensorrt.slots import Cache, Slots, session_bytes
from trifold.shared.bundle.folder import Progress, TierFolder
from trifold.shared.bundle.manifest import Tier
from trifold.shared.errors import ConfigError
from trifold.shared.runtime.selftest import CHUNKINGS, prove, some_rows
from trifold.shared.runtime.shard import Rows

PORTABLE: Final = "portable"

_SPARE: Final = 7 * len(CHUNKINGS)
"""Positions that the self-test asks for beyond its rows."""

log = logging.getLogger(__name__)


class TensorRtEngine:
    """An Engine; single rows are computed together, more of them session by session."""

    tier: Tier = "cloud"
    provider = "TensorRT"
    most_rows = 512

    def __init__(self, runner: Runner, hidden: int, limits: Limits) -> None:
        """Not proved."""
        self.hidden = hidden
        self.fingerprint = ""
        self.exact = False
        self._runner = runner
        self._limits = limits
        self._slots = Slots(limits)

    @classmethod
    def load(
        cls,
        folder: TierFolder,
        *,
        precision: Precision = "bf16",
        limits: Limits | None = None,
        memory: int | None = None,
        portable: bool = False,
        plans: Plans | None = None,
        progress: Progress = lambda done, total: None,
    ) -> TensorRtEngine:
        """The engine of a folder, proved; it is built where `plans` has none for it and this GPU.

        Its caches take `memory` bytes at most, for which it has fewer sessions than `limits` say.
        A `portable` one may run on a later TensorRT, or its lean runtime, than it was built with.
        Raises ConfigError without TensorRT, a GPU that has the precision, or float weights; DamagedFile.
        """
        library = runtime_library()
        check_floats(folder)
        device, plans = Device(), plans or Plans()
        if device.capability < NEEDS[precision]:
            major, minor = device.capability
            raise ConfigError(f"{device.name} (compute capability {major}.{minor}) has no {precision}")
        serving = folder.manifest.serving
        spec, layers = serving.spec, serving.cuts.layers(cls.tier, len(serving.spec.layers))
        limits = (limits or Limits()).within(spec.max_positions)
        if memory is not None:
            limits = limits.fitting(memory, session_bytes(spec, layers, limits.slots, precision))
        version = PORTABLE if portable else library.__version__
        key = Key.of(folder, device.name, device.capability, version, precision, limits)
        plan = plans.read(key.plan)
        if not plan:
            log.info("building %s, which takes minutes", plans.folder / key.plan)
            plan = build(folder, key, plans, portable=portable, progress=progress)
            plans.keep(key.plan, plan)
        engine = cls(GpuRunner(library, plan, device, spec.hidden, precision, limits), spec.hidden, limits)
        engine.prove(f"tensorrt-{library.__version__}", device.name, precision)
        return engine

    def prove(self, *names: str) -> None:
        """The self-test, after which the engine is as empty as before."""
        made: list[Cache] = []

        def cache(capacity: int) -> Cache:
            made.append(self.cache(capacity))
            return made[-1]

        result = prove(
            some_rows(self.hidden, self._limits.positions - _SPARE),
            cache,
            lambda parts: self.run([Part(*part) for part in parts]),
            together=self._limits.sessions - 1 - len(CHUNKINGS),
        )
        for each in made:
            self.release(each)
        self.exact = result.exact
        self.fingerprint = "/".join([*names, result.digest])

    def cache_bytes(self, capacity: int) -> int:
        """Memory of a cache, which is the same for every number of positions."""
        return self._runner.session_bytes

    def cache(self, capacity: int) -> Cache:
        """An empty cache for [0, capacity). Raises PromptTooLong, or Overloaded when all are taken."""
        taken = self._slots.take(capacity)
        # What is masked counts 0 times, but 0 times what is no number would be none either.
        self._runner.clear(taken.slot)
        return taken

    def release(self, cache: Cache) -> None:
        """The next session gets its slot; a turn that comes with it then is refused."""
        self._slots.give_back(cache)

    def run(self, batch: Sequence[Part[Cache]]) -> list[Rows]:
        """As Engine.run(). Raises UnknownSession, too, for a cache that was given up."""
        for part in batch:
            check(part, self.hidden)
            self._slots.check(part.cache)
        single = [part for part in batch if len(part.rows) == 1]
        together = iter(self._together(single))
        out = [next(together) if len(part.rows) == 1 else self._alone(part) for part in batch]
        for part in batch:
            part.cache.have = part.base_pos + len(part.rows)
        return out

    def _together(self, parts: Sequence[Part[Cache]]) -> list[Rows]:
        """A row of each. Slots between theirs get a row, too, where nothing is that anyone wants."""
        if not parts:
            return []
        size = padded(1 + max(part.cache.slot for part in parts), self._limits)
        rows = np.zeros((size, 1, self.hidden), np.float32)
        positions = np.array(self._slots.free_positions(size), np.int64)[:, None]
        for part in parts:
            rows[part.cache.slot] = part.rows
            positions[part.cache.slot] = part.base_pos
        out = self._runner.decode(rows, positions)
        return [out[part.cache.slot].copy() for part in parts]

    def _alone(self, part: Part[Cache]) -> Rows:
        step = self._limits.rows
        return np.concatenate(
            [
                self._runner.prompt(part.cache.slot, part.rows[start : start + step], part.base_pos + start)
                for start in range(0, len(part.rows), step)
            ]
        )
