"""Device: memory, copies and graphs of one GPU, through cuda-bindings.

Not through torch: the core's buffers are a handful of allocations that live as long as the process, for which
3 GB of torch need not be installed beside TensorRT, nor another allocator hold part of the card's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trifold.cloud.core.engines.tensorrt.library import cuda
from trifold.shared.errors import ConfigError, TrifoldError


class Device:
    """The first GPU, with one stream: what is asked of it is done in order.

    Raises ConfigError where there is no GPU, TrifoldError for whatever CUDA refuses later.
    """

    def __init__(self) -> None:
        self._cuda = cuda()
        error, count = self._cuda.cudaGetDeviceCount()
        if error != self._cuda.cudaError_t.cudaSuccess or not count:
            raise ConfigError(f"the engine tensorrt needs an NVIDIA GPU: {self._told(error)}")
        properties = self._done(self._cuda.cudaGetDeviceProperties(0))
        self.name = properties.name.decode().rstrip("\0")
        self.capability = (int(properties.major), int(properties.minor))
        self.stream = int(self._done(self._cuda.cudaStreamCreate()))

    def zeros(self, size: int) -> int:
        """The address of so many bytes of 0, until the process ends."""
        address = int(self._done(self._cuda.cudaMalloc(size)))
        self.clear(address, size)
        return address

    def clear(self, address: int, size: int) -> None:
        self._done(self._cuda.cudaMemsetAsync(address, 0, size, self.stream))

    def upload(self, array: NDArray[Any], address: int) -> None:
        """Copies a contiguous array, which may change when this returns."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._done(self._cuda.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, self.stream))

    def download(self, address: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """fp32 values, when all that was asked before is done."""
        array = np.empty(shape, np.float32)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._done(self._cuda.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, self.stream))
        self.wait()
        return array

    def wait(self) -> None:
        self._done(self._cuda.cudaStreamSynchronize(self.stream))

    def captured(self, launch: Callable[[], None]) -> Callable[[], None]:
        """A CUDA graph of what `launch` puts on the stream, to be launched as a whole."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._done(self._cuda.cudaStreamBeginCapture(self.stream, mode))
        try:
            launch()
        finally:
            ended = self._cuda.cudaStreamEndCapture(self.stream)
        graph = self._done(self._cuda.cudaGraphInstantiate(self._done(ended), 0))
        return lambda: self._done(self._cuda.cudaGraphLaunch(graph, self.stream))

    def _done(self, result: tuple[Any, ...]) -> Any:
        """What a call gave. Raises TrifoldError."""
        error, *values = result
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise TrifoldError(f"CUDA: {self._told(error)}")
        return values[0] if values else None

    def _told(self, error: Any) -> str:
        _, text = self._cuda.cudaGetErrorString(error)
        return text.decode() if isinstance(text, bytes) else str(error)
