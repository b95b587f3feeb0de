"""A TCP proxy on loopback that delays, narrows, stalls or cuts what passes through it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

_CHUNK: Final = 16 * 1024

_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER that makes close() send a reset, as a peer that crashed would."""


class Proxy:
    """Listens at `address` and passes bytes on to `target` (HOST:PORT), both ways, as an async context.

    `delay` is in seconds one way, `bandwidth` in bytes a second and direction (0: no limit).
    Both may be changed at any time, and hold for what arrives from then on. `record` is told what passes.
    """

    def __init__(
        self,
        target: str,
        *,
        delay: float = 0.0,
        bandwidth: float = 0.0,
        record: Callable[[bytes], object] | None = None,
    ) -> None:
        self.target = target
        self.delay = delay
        self.bandwidth = bandwidth
        self.record = record
        self.address = ""
        self.connections = 0
        self.bytes_up = 0
        self.bytes_down = 0
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._refusing = False
        self._pairs: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        await self.cut()

    async def cut(self) -> None:
        """Resets every connection; new ones are accepted."""
        pairs = list(self._pairs)
        for pair in pairs:
            pair.cancel()
        await asyncio.gather(*pairs, return_exceptions=True)

    def stall(self) -> None:
        """Holds every byte back from now on, while the connections stay."""
        self._flowing.clear()

    def flow(self) -> None:
        """Ends a stall."""
        self._flowing.set()

    def refuse(self, refusing: bool) -> None:
        """Whether new connections are reset at once."""
        self._refusing = refusing

    async def _accept(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pairs.add(task)
        writers = [near_out]
        try:
            if not self._refusing:
                self.connections += 1
                host, _, port = self.target.rpartition(":")
                far_in, far_out = await asyncio.open_connection(host, int(port))
                writers.append(far_out)
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pass(near_in, far_out, up=True))
                    group.create_task(self._pass(far_in, near_out, up=False))
        except (asyncio.CancelledError, OSError, ExceptionGroup):
            # Cut, or one side was lost: the other learns of it by the reset below.
            pass
        finally:
            self._pairs.discard(task)
            for writer in writers:
                _reset(writer)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, up: bool) -> None:
        """Passes one direction on until its end."""
        # Chunks with the time when they are due: what is on the way on a long, wide link.
        way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=1024)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._deliver(way, sink))
            free = 0.0
            while True:
                chunk = await source.read(_CHUNK)
                if self.record:
                    self.record(chunk)
                if up:
                    self.bytes_up += len(chunk)
                else:
                    self.bytes_down += len(chunk)
                now = asyncio.get_running_loop().time()
                free = max(free, now) + (len(chunk) / self.bandwidth if self.bandwidth else 0.0)
                await way.put((free + self.delay, chunk))
                if not chunk:
                    return

    async def _deliver(self, way: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, chunk = await way.get()
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            await self._flowing.wait()
            if not chunk:
                sink.write_eof()
                return
            sink.write(chunk)
            await sink.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
