"""The core on TensorRT.

What was run where is told in docs/engines.md. Rows of one session do not touch another's, but whether they
get the same bits in every batch is the choice of TensorRT's kernels: the self-test finds out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from trifold.cloud.core.engines.engine import Part, check
from trifold.cloud.core.engines.tensorrt.batch import Batch, Memory, contiguous
from trifold.cloud.core.engines.tensorrt.build import build
from trifold.cloud.core.engines.tensorrt.device import Device
from trifold.cloud.core.engines.tensorrt.floats import check_floats
from trifold.cloud.core.engines.tensorrt.library import logger, runtime_library
from trifold.cloud.core.engines.tensorrt.plans import Key, Plans
from trifold.cloud.core.engines.tensorrt.precision import COMPUTED, NEEDS, NUMPY, Precision
from trifold.cloud.core.engines.tensorrt.profiles import DECODE, PROMPT, Limits, padded, sizes
from trifold.cloud.core.engines.tensorrt.slots import Cache, Slots
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import Tier
from trifold.shared.errors import ConfigError, TrifoldError
from trifold.shared.runtime.selftest import CHUNKINGS, prove, some_rows
from trifold.shared.runtime.shard import Rows

if TYPE_CHECKING:
    import tensorrt as trt

PORTABLE: Final = "portable"

_SPARE: Final = 7 * len(CHUNKINGS)
"""Positions that the self-test asks for beyond its rows."""

log = logging.getLogger(__name__)


class TensorRtEngine:
    """The float weights of a core, in caches of a fixed size for a fixed number of sessions."""

    tier: Tier = "cloud"
    provider = "TensorRT"
    most_rows = 512

    def __init__(
        self, library: Any, plan: bytes, device: Device, hidden: int, precision: Precision, limits: Limits
    ) -> None:
        """Of a plan that `library`, TensorRT or its lean runtime, can run. Raises TrifoldError."""
        self.hidden = hidden
        self.fingerprint = ""
        self.exact = False
        self._device = device
        self._limits = limits
        self._slots = Slots(limits)
        self._runtime: trt.Runtime = library.Runtime(logger(library))
        # A version-compatible plan brings its runtime along. Plans come from a folder that only we write to.
        self._runtime.engine_host_code_allowed = True
        engine: trt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise TrifoldError("TensorRT cannot load the engine: its log says why")
        self._engine = engine
        itemsize = NUMPY[COMPUTED[precision]].itemsize
        self._memory = Memory(engine, device, limits, hidden, itemsize)
        self._prompt = Batch(library, engine, PROMPT, device, self._memory)
        self._decode: dict[int, Batch] = {}
        for size in sizes(limits):
            # A context for each: CUDA graphs of one would have to be captured again at every change.
            batch = self._decode[size] = Batch(library, engine, DECODE, device, self._memory)
            batch.shape(size, 1)
            batch.place(0)
            batch.capture()

    @classmethod
    def load(
        cls,
        folder: TierFolder,
        *,
        precision: Precision = "bf16",
        limits: Limits | None = None,
        portable: bool = False,
        plans: Plans | None = None,
    ) -> TensorRtEngine:
        """The engine of a folder, proved; it is built where `plans` has none for them and this GPU.

        Raises ConfigError without TensorRT, a GPU that has the precision, or float weights; DamagedFile.
        """
        library = runtime_library()
        check_floats(folder)
        device, plans = Device(), plans or Plans()
        if device.capability < NEEDS[precision]:
            major, minor = device.capability
            raise ConfigError(f"{device.name} (compute capability {major}.{minor}) has no {precision}")
        spec = folder.manifest.serving.spec
        limits = (limits or Limits()).within(spec.max_positions)
        version = PORTABLE if portable else library.__version__
        key = Key.of(folder, device.name, device.capability, version, precision, limits)
        plan = plans.read(key.plan)
        if not plan:
            log.info("building the TensorRT engine %s, which takes minutes", plans.folder / key.plan)
            plan = build(folder, key, plans, portable=portable)
            plans.keep(key.plan, plan)
        engine = cls(library, plan, device, spec.hidden, precision, limits)
        engine.prove(f"tensorrt-{library.__version__}", f"{device.name}-{precision}")
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
        )
        for each in made:
            self.release(each)
        self.exact = result.exact
        self.fingerprint = "/".join([*names, result.digest])

    def cache_bytes(self, capacity: int) -> int:
        """Memory of a cache, which is the same for every number of positions."""
        return self._memory.session_bytes

    def cache(self, capacity: int) -> Cache:
        """An empty cache for [0, capacity). Raises PromptTooLong, or Overloaded when all are taken."""
        taken = self._slots.take(capacity)
        # What is masked counts 0 times, but 0 times what is no number would be none either.
        for kept in self._memory.caches:
            self._device.clear(kept.address + taken.slot * kept.stride, kept.stride)
        return taken

    def release(self, cache: Cache) -> None:
        """The next session gets its slot; a turn that comes with it then is refused."""
        self._slots.give_back(cache)

    def run(self, batch: Sequence[Part[Cache]]) -> list[Rows]:
        """As Engine.run(). Single rows go together, more of them session by session."""
        for part in batch:
            check(part, self.hidden)
            self._slots.check(part.cache)
        single = [part for part in batch if len(part.rows) == 1]
        rows = dict(zip(map(id, single), self._together(single), strict=True))
        out = [rows[id(part)] if id(part) in rows else self._alone(part) for part in batch]
        for part in batch:
            part.cache.have = part.base_pos + len(part.rows)
        return out

    def _together(self, parts: Sequence[Part[Cache]]) -> list[Rows]:
        if not parts:
            return []
        places = [part.cache.slot for part in parts]
        size = padded(max(places) + 1, self._limits)
        rows = contiguous([part.rows for part in parts], size, self.hidden, places)
        positions = np.array(self._slots.free_positions(size), np.int64)[:, None]
        for part in parts:
            positions[part.cache.slot] = part.base_pos
        out = self._decode[size].run(rows, positions)
        return [out[place] for place in places]

    def _alone(self, part: Part[Cache]) -> Rows:
        out: list[Rows] = []
        self._prompt.place(part.cache.slot)
        for start in range(0, len(part.rows), self._limits.rows):
            rows = np.ascontiguousarray(part.rows[start : start + self._limits.rows])
            first = part.base_pos + start
            self._prompt.shape(1, len(rows))
            out.append(self._prompt.run(rows[None], np.arange(first, first + len(rows))[None])[0])
        return np.concatenate(out)
