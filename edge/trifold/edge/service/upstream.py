"""The edge's end of the link to the core."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import Final, Never

import grpc.aio
from google.protobuf.message import DecodeError

from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import DeadlineExceeded, TrifoldError, Unavailable
from trifold.shared.session.channel import connect
from trifold.shared.session.ending import Ending
from trifold.shared.session.status import from_rpc_error

_CORE: Final = "/trifold.proto.v1.CoreService"

_OPEN_SECONDS: Final = 3.0
"""How long an Open waits for a core that is not there: one that restarts is worth a moment."""

_GOODBYE_SECONDS: Final = 1.0
"""How long a Close waits to be heard."""

Call = grpc.aio.StreamStreamCall[bytes, bytes]


class Core:
    """The core at `address` (HOST:PORT), which may come and go; `timeout` seconds for each of its answers."""

    def __init__(self, address: str, timeout: float) -> None:
        self.name = f"the core at {address}"
        self.timeout = timeout
        self._channel = connect(address)
        self._session: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(
            f"{_CORE}/Session"
        )
        self._describe: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(
            f"{_CORE}/Describe"
        )

    @asynccontextmanager
    async def open(self, opening: pb.Open) -> AsyncIterator[CoreStream]:
        """A stream that the core has answered with Opened; leaving it ends the stream.

        Raises what the core answered, or Unavailable when it is not there.
        """
        call: Call = self._session(wait_for_ready=True)
        stream = CoreStream(self, call)
        try:
            await stream.open(opening)
            yield stream
        finally:
            await stream.end()

    async def describe(self) -> pb.DescribeResponse:
        """Raises Unavailable when the core is not there."""
        request = pb.DescribeRequest().SerializeToString()
        try:
            data = await self._describe(request, timeout=min(self.timeout, _OPEN_SECONDS))
            return pb.DescribeResponse.FromString(data)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self.name) from None
        except DecodeError:
            raise nonsense(self.name, "a description that is not one") from None

    async def close(self) -> None:
        await self._channel.close()


class CoreStream:
    """One session's stream to the core.

    Its methods raise what ended it: what the core answered, or Unavailable when it was lost. Reading and
    writing have tasks of their own, because grpc.aio cancels a call when somebody gives up waiting for them.
    """

    def __init__(self, core: Core, call: Call) -> None:
        self.opened = pb.Opened()
        self._core = core
        self._call = call
        self._ending = Ending(call, core.name)
        # Neither is longer than the steps in flight, but for Open and Close.
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue()
        self._inbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._unanswered = 0
        self._progress = 0.0
        self._reading = asyncio.create_task(self._read())
        self._writing = asyncio.create_task(self._write())

    async def open(self, opening: pb.Open) -> None:
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                self._send(pb.SessionRequest(open=opening))
                response, _ = await self._next()
        except TimeoutError:
            hint = "is `trifold cloud serve` running?"
            raise Unavailable(f"{self._core.name} is not there: {hint}", retry_after=1.0) from None
        if response.WhichOneof("kind") != "opened":
            raise self.nonsense("no Opened")
        self.opened = response.opened

    def send(self, step: pb.Step) -> int:
        """Sends a step, and returns the bytes of its message."""
        if self._unanswered == 0:
            self._progress = monotonic()
        self._unanswered += 1
        return self._send(pb.SessionRequest(step=step))

    async def receive(self) -> tuple[pb.SessionResponse, int]:
        """The next result and the bytes of its message."""
        response, size = await self._next()
        if response.WhichOneof("kind") != "result":
            raise self.nonsense("no result")
        self._unanswered -= 1
        self._progress = monotonic()
        return response, size

    async def lost(self) -> Never:
        """Waits until the stream ends, and raises why; DeadlineExceeded when the core has fallen silent."""
        patience = self._core.timeout
        while not self._reading.done():
            await asyncio.wait([self._reading], timeout=patience / 4)
            if self._unanswered and monotonic() - self._progress > patience:
                raise DeadlineExceeded(f"{self._core.name} sent no result for {patience:g} s")
        raise await self._ending.error()

    async def close(self) -> None:
        """Tells the core that the session is over, and waits a moment until it has heard."""
        self._send(pb.SessionRequest(close=pb.Close()))
        await asyncio.wait([self._reading], timeout=_GOODBYE_SECONDS)

    async def end(self) -> None:
        """Ends the call, if it has not ended."""
        self._call.cancel()
        self._writing.cancel()
        await asyncio.gather(self._reading, self._writing, return_exceptions=True)

    def nonsense(self, what: str) -> TrifoldError:
        return nonsense(self._core.name, what)

    def _send(self, request: pb.SessionRequest) -> int:
        data = request.SerializeToString()
        self._outbox.put_nowait(data)
        return len(data)

    async def _next(self) -> tuple[pb.SessionResponse, int]:
        data = await self._inbox.get()
        if data is None:
            raise await self._ending.error()
        try:
            return pb.SessionResponse.FromString(data), len(data)
        except DecodeError:
            raise self.nonsense("a message that is not a SessionResponse") from None

    async def _read(self) -> None:
        with suppress(grpc.aio.AioRpcError):
            async for data in self._call:
                self._inbox.put_nowait(data)
        self._inbox.put_nowait(None)

    async def _write(self) -> None:
        # What ended a call that takes no more is what reading it tells.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self._call.write(await self._outbox.get())


def nonsense(name: str, what: str) -> TrifoldError:
    """The error for a peer that does not keep to the protocol."""
    return TrifoldError(f"{name} sent {what}: is it of the same version of Trifold?")
