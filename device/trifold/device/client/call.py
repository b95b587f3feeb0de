"""The gRPC call under a stream: requests out, responses in, and what ended it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

import grpc.aio

from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import TrifoldError, Unavailable
from trifold.shared.session.status import from_rpc_error

SessionCall = grpc.aio.StreamStreamCall[pb.SessionRequest, pb.SessionResponse]

_GOODBYE: Final = 1.0
"""Seconds that the edge gets to act on a Close."""


class Call:
    """Writes requests and reads responses.

    Reading goes on in a task of its own, so that giving up a wait does not cancel the call: the edge would
    then keep the session on its lease instead of freeing it.
    """

    def __init__(self, call: SessionCall, edge: str) -> None:
        self._call = call
        self._edge = edge
        self._inbox: asyncio.Queue[pb.SessionResponse | TrifoldError] = asyncio.Queue()
        self._reader = asyncio.create_task(self._read())
        self._closing: asyncio.Task[None] | None = None

    async def send(self, request: pb.SessionRequest) -> None:
        """On a call that has ended this does nothing: receive() says what happened to it."""
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._call.write(request)

    async def receive(self) -> pb.SessionResponse:
        """The next response. Raises what ended the call; Unavailable when the edge just left."""
        response = await self._inbox.get()
        if isinstance(response, TrifoldError):
            raise response
        return response

    def begin_close(self) -> asyncio.Task[None]:
        """Says Close, so that every tier frees the session; the task is over when the edge has heard it."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        return self._closing

    async def _close(self) -> None:
        try:
            await self.send(pb.SessionRequest(close=pb.Close()))
            await asyncio.wait({self._reader}, timeout=_GOODBYE)
        finally:
            self._call.cancel()

    async def _read(self) -> None:
        try:
            async for response in self._call:
                self._inbox.put_nowait(response)
            end: TrifoldError = Unavailable(f"the edge at {self._edge} ended the stream")
        except grpc.aio.AioRpcError as error:
            end = from_rpc_error(error, f"the edge at {self._edge}")
        self._inbox.put_nowait(end)
