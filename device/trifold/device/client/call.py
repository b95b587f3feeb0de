"""The gRPC call under a stream: requests out, responses in, and what ended it."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Final

import grpc.aio

from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import ConfigError, TrifoldError
from trifold.shared.session.ending import Ending

SessionCall = grpc.aio.StreamStreamCall[pb.SessionRequest, pb.SessionResponse]

_GOODBYE: Final = 1.0
"""Seconds that the edge gets to act on a Close."""


def explained(end: TrifoldError, peer: str) -> TrifoldError:
    """What a call to the edge, `peer`, ended with; it is told where nothing there is an edge's service."""
    if isinstance(end, ConfigError):
        return ConfigError(f"{peer}: a Trifold cloud, or something else, answers there, not an edge")
    return end


class Call:
    """Writes requests and reads responses, in tasks of its own.

    So whoever waits here can give up without cancelling the call: the edge would then keep the session on its
    lease instead of freeing it.
    """

    def __init__(self, call: SessionCall, peer: str) -> None:
        """`peer` is what errors call the other end."""
        self._call = call
        self._peer = peer
        self._ending = Ending(call, peer)
        self._responses = aiter(call)
        self._outbox: asyncio.Queue[pb.SessionRequest] = asyncio.Queue()
        self._writing = asyncio.create_task(self._write())
        self._reading: asyncio.Task[tuple[pb.SessionResponse, int]] | None = None
        self._closing: asyncio.Task[None] | None = None

    def send(self, request: pb.SessionRequest) -> None:
        """On a call that has ended this does nothing: receive() says what happened to it."""
        self._outbox.put_nowait(request)

    async def receive(self) -> tuple[pb.SessionResponse, int]:
        """The next response and when it came (monotonic nanoseconds).

        Raises what ended the call; Unavailable when the edge just left.
        """
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
        response = await asyncio.shield(self._reading)
        self._reading = None
        return response

    def begin_close(self) -> asyncio.Task[None]:
        """Says Close, so that every tier frees the session; the task is over when the edge has heard it."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        return self._closing

    async def _close(self) -> None:
        self.send(pb.SessionRequest(close=pb.Close()))
        # A session that the edge does not hear the end of, ends with its lease.
        with suppress(TimeoutError, TrifoldError):
            async with asyncio.timeout(_GOODBYE):
                while True:
                    await self.receive()
        self._writing.cancel()
        self._call.cancel()

    async def _write(self) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self._call.write(await self._outbox.get())

    async def _read(self) -> tuple[pb.SessionResponse, int]:
        try:
            return await anext(self._responses), time.monotonic_ns()
        except (grpc.aio.AioRpcError, StopAsyncIteration):
            self._writing.cancel()
            raise explained(await self._ending.error(), self._peer) from None
