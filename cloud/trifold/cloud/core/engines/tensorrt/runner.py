"""Runner: a plan on the GPU, with a CUDA graph for every size of a decoding batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trifold.cloud.core.engines.tensorrt.batch import Batch, Memory
from trifold.cloud.core.engines.tensorrt.device import Device
from trifold.cloud.core.engines.tensorrt.library import logger
from trifold.cloud.core.engines.tensorrt.precision import COMPUTED, NUMPY, Precision
from trifold.cloud.core.engines.tensorrt.profiles import DECODE, PROMPT, Limits, sizes
from trifold.shared.errors import TrifoldError
from trifold.shared.runtime.shard import Rows

if TYPE_CHECKING:
    import tensorrt as trt


class Runner(Protocol):
    """Computes the graph over caches of its own, one for each slot."""

    session_bytes: int

    def clear(self, slot: int) -> None:
        """Fills a slot's cache with zeros."""
        ...

    def decode(self, rows: Rows, positions: NDArray[np.int64]) -> Rows:
        """A row (sessions, 1, hidden) at its position (sessions, 1) of each of the first slots."""
        ...

    def prompt(self, slot: int, rows: Rows, first: int) -> Rows:
        """Rows (rows, hidden) of one slot, at positions from `first` on."""
        ...


class GpuRunner:
    """As Runner; decode takes as many sessions as sizes() has."""

    def __init__(
        self, library: Any, plan: bytes, device: Device, hidden: int, precision: Precision, limits: Limits
    ) -> None:
        """Of a plan that `library`, TensorRT or its lean runtime, can run. Raises TrifoldError."""
        self._device = device
        self._runtime: trt.Runtime = library.Runtime(logger(library))
        # A version-compatible plan brings its runtime along. Plans come from a folder that only we write to.
        self._runtime.engine_host_code_allowed = True
        engine: trt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise TrifoldError("TensorRT cannot load the engine: its log says why")
        self._engine = engine
        self._memory = Memory(engine, device, limits, hidden, NUMPY[COMPUTED[precision]].itemsize)
        self.session_bytes = self._memory.session_bytes
        self._prompt = Batch(library, engine, PROMPT, device, self._memory)
        self._decode: dict[int, Batch] = {}
        for size in sizes(limits):
            # A context for each: CUDA graphs of one would have to be captured again at every change.
            batch = self._decode[size] = Batch(library, engine, DECODE, device, self._memory)
            batch.shape(size, 1)
            batch.place(0)
            batch.capture()

    def clear(self, slot: int) -> None:
        for kept in self._memory.caches:
            self._device.clear(kept.address + slot * kept.stride, kept.stride)

    def decode(self, rows: Rows, positions: NDArray[np.int64]) -> Rows:
        return self._decode[len(rows)].run(rows, positions)

    def prompt(self, slot: int, rows: Rows, first: int) -> Rows:
        self._prompt.place(slot)
        self._prompt.shape(1, len(rows))
        positions = np.arange(first, first + len(rows))
        out: Rows = self._prompt.run(np.ascontiguousarray(rows)[None], positions[None])[0]
        return out
