"""The gRPC call under a stream: requests out, responses in, and what ended it."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Final

import grpc.aio

from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import ConfigError, TrifoldError, Unavailable
from trifold.shared.session.status import from_rpc_error

SessionCall = grpc.aio.StreamStreamCall[pb.SessionRequest, pb.SessionResponse]

_GOODBYE: Final = 1.0
"""Seconds that the edge gets to act on a Close."""


def ending(error: grpc.aio.AioRpcError, peer: str) -> TrifoldError:
    """The error that a call to the edge, `peer`, ended with."""
    end = from_rpc_error(error, peer)
    if error.code() is grpc.StatusCode.UNIMPLEMENTED and isinstance(end, ConfigError):
        return ConfigError(f"{peer}: a Trifold cloud, or something else, answers there, not an edge")
    return end


class Call:
    """Writes requests and reads responses, each in a task of its own.

    So whoever waits here can give up without cancelling the call: the edge would then keep the session on its
    lease instead of freeing it.
    """

    def __init__(self, call: SessionCall, peer: str) -> None:
        """`peer` is what errors call the other end."""
        self._call = call
        self._peer = peer
        self._outbox: asyncio.Queue[pb.SessionRequest] = asyncio.Queue()
        self._inbox: asyncio.Queue[tuple[pb.SessionResponse | TrifoldError, int]] = asyncio.Queue()
        self._writer = asyncio.create_task(self._write())
        self._reader = asyncio.create_task(self._read())
        self._closing: asyncio.Task[None] | None = None

    def send(self, request: pb.SessionRequest) -> None:
        """On a call that has ended this does nothing: receive() says what happened to it."""
        self._outbox.put_nowait(request)

    async def receive(self) -> tuple[pb.SessionResponse, int]:
        """The next response and when it came (monotonic nanoseconds).

        Raises what ended the call; Unavailable when the edge just left.
        """
        response, received_ns = await self._inbox.get()
        if isinstance(response, TrifoldError):
            raise response
        return response, received_ns

    def begin_close(self) -> asyncio.Task[None]:
        """Says Close, so that every tier frees the session; the task is over when the edge has heard it."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        return self._closing

    async def _close(self) -> None:
        self.send(pb.SessionRequest(close=pb.Close()))
        # A session that the edge does not hear the end of, ends with its lease.
        await asyncio.wait({self._reader}, timeout=_GOODBYE)
        self._call.cancel()

    async def _write(self) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self._call.write(await self._outbox.get())

    async def _read(self) -> None:
        try:
            async for response in self._call:
                self._inbox.put_nowait((response, time.monotonic_ns()))
            end: TrifoldError = Unavailable(f"{self._peer} ended the stream")
        except grpc.aio.AioRpcError as error:
            end = ending(error, self._peer)
        finally:
            self._writer.cancel()
        self._inbox.put_nowait((end, time.monotonic_ns()))
