"""The three shards in three processes joined by pipes: what a split costs without gRPC and services."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np

from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import Tier
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.runtime.shard import Rows, Shard

CAPACITY: Final = 1024

_spawn = multiprocessing.get_context("spawn")


class Pipes:
    """The shards of a bundle, the device's in this process. A context; decodes one token at a time."""

    def __init__(self, bundle: Path, threads: int) -> None:
        self._device = _Part(bundle, "device", threads)
        self._edge, edge = _spawn.Pipe()
        to_core, core = _spawn.Pipe()
        self._processes = [
            _spawn.Process(target=_serve, args=(bundle, "cloud", threads, core, None), daemon=True),
            _spawn.Process(target=_serve, args=(bundle, "edge", threads, edge, to_core), daemon=True),
        ]

    def __enter__(self) -> Self:
        for process in self._processes:
            process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.terminate()
            process.join()

    def step(self, tokens: int) -> float:
        """Mean milliseconds from one greedy token to the next."""
        token, times = 0, []
        for position in range(tokens):
            self._edge.send_bytes(np.array([position, token]).tobytes())
            logits = self._device.compute(self._edge.recv_bytes())
            token = int(logits.argmax())
            times.append(time.perf_counter())
        return 1000 * (times[-1] - times[0]) / (len(times) - 1)


class _Part:
    """A shard with a cache. A message is a position, and the token or the encoded row that stands there."""

    def __init__(self, bundle: Path, tier: Tier, threads: int) -> None:
        folder = TierFolder.open(bundle, tier)
        self._shard = Shard.load(folder, threads=threads)
        self._codec = RowCodec(folder.manifest.serving.codec, self._shard.hidden)
        self._cache = self._shard.cache(CAPACITY)

    def compute(self, message: bytes) -> Rows:
        position, data = int.from_bytes(message[:8], "little"), message[8:]
        edge = self._shard.tier == "edge"
        inputs = np.frombuffer(data, np.int64) if edge else self._codec.decode(data, 1, position)
        return self._shard.run(self._cache, inputs, position)

    def answer(self, message: bytes) -> bytes:
        return message[:8] + self._codec.encode(self.compute(message), int.from_bytes(message[:8], "little"))


def _serve(bundle: Path, tier: Tier, threads: int, here: Connection, further: Connection | None) -> None:
    part = _Part(bundle, tier, threads)
    while True:
        message = part.answer(here.recv_bytes())
        if further:
            further.send_bytes(message)
            message = further.recv_bytes()
        here.send_bytes(message)
