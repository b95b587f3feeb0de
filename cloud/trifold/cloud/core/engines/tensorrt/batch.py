"""Batch: an execution context of one profile, and the memory that it reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trifold.cloud.core.engines.tensorrt.device import Device
from trifold.cloud.core.engines.tensorrt.profiles import Limits, Shape, shape_of
from trifold.shared.errors import TrifoldError
from trifold.shared.runtime.shard import Rows

if TYPE_CHECKING:
    import tensorrt as trt


@dataclass(frozen=True)
class Kept:
    """A cache of all sessions: where it lies, and the bytes of one session."""

    name: str
    address: int
    stride: int


class Memory:
    """What all batches share, one at a time: rows in and out, caches, and TensorRT's own scratch memory."""

    def __init__(
        self, engine: trt.ICudaEngine, device: Device, limits: Limits, hidden: int, itemsize: int
    ) -> None:
        """A value of a cache takes `itemsize` bytes. Raises TrifoldError where the card has not the room."""
        rows = max(limits.sessions, limits.rows)
        self.hidden = hidden
        self.inputs = {
            "rows": device.zeros(rows * hidden * 4),
            "positions": device.zeros(rows * 8),
            "write_at": device.zeros(limits.sessions * 8),
        }
        self.out = device.zeros(rows * hidden * 4)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.declared: dict[str, Shape] = {
            name: sizes_of(engine.get_tensor_shape(name))
            for name in names
            if name in self.inputs or name.startswith("past_")
        }
        self.caches: list[Kept] = []
        for name, shape in self.declared.items():
            if name.startswith("past_"):
                stride = int(np.prod(shape[1:])) * itemsize
                address = device.zeros(limits.sessions * stride)
                self.caches.append(Kept(name.removeprefix("past_"), address, stride))
        self.scratch_size = engine.device_memory_size_v2
        self.scratch = device.zeros(max(1, self.scratch_size))

    @property
    def session_bytes(self) -> int:
        """What the caches take for a session."""
        return sum(cache.stride for cache in self.caches)


class Batch:
    """Runs (sessions, rows) of one profile, of sessions in neighbouring slots."""

    def __init__(
        self, library: Any, engine: trt.ICudaEngine, profile: int, device: Device, memory: Memory
    ) -> None:
        self._device = device
        self._memory = memory
        strategy = library.ExecutionContextAllocationStrategy.USER_MANAGED
        self._context: trt.IExecutionContext = engine.create_execution_context(strategy)
        self._context.set_device_memory(memory.scratch, memory.scratch_size)
        self._accepted(self._context.set_optimization_profile_async(profile, device.stream), "a profile")
        device.wait()
        for name, address in (*memory.inputs.items(), ("rows_out", memory.out)):
            self._accepted(self._context.set_tensor_address(name, address), name)
        self._slot = -1
        self._launch: Callable[[], None] = self._enqueue

    def shape(self, sessions: int, rows: int) -> None:
        """Says of how many sessions, and rows of each, the next run is."""
        for name, declared in self._memory.declared.items():
            shape = shape_of(declared, sessions, rows)
            self._accepted(self._context.set_input_shape(name, shape), f"{name} {shape}")

    def place(self, slot: int) -> None:
        """Says which slot the first session has. A cache is read and written at one address."""
        if slot == self._slot:
            return
        self._slot = slot
        for cache in self._memory.caches:
            for kind in ("past", "present"):
                address = cache.address + slot * cache.stride
                self._accepted(self._context.set_tensor_address(f"{kind}_{cache.name}", address), cache.name)

    def capture(self) -> None:
        """Makes a CUDA graph of it, for this shape and place for good."""
        self._enqueue()  # what TensorRT does the first time cannot be captured
        self._device.wait()
        self._launch = self._device.captured(self._enqueue)

    def run(self, rows: Rows, positions: NDArray[np.int64]) -> Rows:
        """From rows (sessions, rows, hidden) and their positions (sessions, rows) to rows of that shape."""
        for name, array in (("rows", rows), ("positions", positions), ("write_at", positions[:, 0].copy())):
            self._device.upload(array, self._memory.inputs[name])
        self._launch()
        return self._device.download(self._memory.out, rows.shape)

    def _enqueue(self) -> None:
        self._accepted(self._context.execute_async_v3(self._device.stream), "a batch")

    def _accepted(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise TrifoldError(f"TensorRT does not take {what}: its log says why")


def sizes_of(dims: trt.Dims) -> Shape:
    """A shape as a tuple, -1 for what a profile bounds."""
    return tuple(dims[axis] for axis in range(len(dims)))
