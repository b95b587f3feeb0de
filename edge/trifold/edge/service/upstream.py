"""The edge's end of the link to the core."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
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

    Its methods raise what ended it: what the core answered, or Unavailable when it was lost. Giving up the
    wait for one of them leaves the call alone, where grpc.aio would cancel it: hence tasks of its own.
    """

    def __init__(self, core: Core, call: Call) -> None:
        self.opened = pb.Opened()
        self._core = core
        self._call = call
        self._ending = Ending(call, core.name)
        # No longer than the steps in flight: the core only ever answers.
        self._inbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._reading = asyncio.create_task(self._read())
        self._writing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._writing.set_result(None)

    async def open(self, opening: pb.Open) -> None:
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                await self._write(pb.SessionRequest(open=opening))
                response, _ = await self._next()
        except TimeoutError:
            hint = "is `trifold cloud serve` running?"
            raise Unavailable(f"{self._core.name} is not there: {hint}", retry_after=1.0) from None
        if response.WhichOneof("kind") != "opened":
            raise self.nonsense("no Opened")
        self.opened = response.opened

    async def send(self, step: pb.Step) -> int:
        """Sends a step, and returns the bytes of its message."""
        return await self._write(pb.SessionRequest(step=step))

    async def receive(self) -> tuple[pb.SessionResponse, int]:
        """The next result and the bytes of its message. Raises DeadlineExceeded as well."""
        try:
            async with asyncio.timeout(self._core.timeout):
                response, size = await self._next()
        except TimeoutError:
            seconds = self._core.timeout
            raise DeadlineExceeded(f"{self._core.name} sent no result for {seconds:g} s") from None
        if response.WhichOneof("kind") != "result":
            raise self.nonsense("no result")
        return response, size

    async def lost(self) -> Never:
        """Waits until the stream ends, and raises why."""
        await asyncio.wait([self._reading])
        raise await self._ending.error()

    async def close(self) -> None:
        """Tells the core that the session is over, and waits a moment until it has heard."""
        with suppress(TrifoldError, TimeoutError):
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await self._write(pb.SessionRequest(close=pb.Close()))
                await asyncio.wait([self._reading])

    async def end(self) -> None:
        """Ends the call, if it has not ended."""
        self._call.cancel()
        # A write that waits for a connection does not notice.
        self._writing.cancel()
        await asyncio.gather(self._reading, self._writing, return_exceptions=True)

    def nonsense(self, what: str) -> TrifoldError:
        return nonsense(self._core.name, what)

    async def _read(self) -> None:
        with suppress(grpc.aio.AioRpcError):
            async for data in self._call:
                self._inbox.put_nowait(data)
        self._inbox.put_nowait(None)

    async def _next(self) -> tuple[pb.SessionResponse, int]:
        data = await self._inbox.get()
        if data is None:
            raise await self._ending.error()
        try:
            return pb.SessionResponse.FromString(data), len(data)
        except DecodeError:
            raise self.nonsense("a message that is not a SessionResponse") from None

    async def _write(self, request: pb.SessionRequest) -> int:
        data = request.SerializeToString()
        try:
            await asyncio.shield(self._writing)
            self._writing = asyncio.ensure_future(self._call.write(data))
            await asyncio.shield(self._writing)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise await self._ending.error() from None
        return len(data)


def nonsense(name: str, what: str) -> TrifoldError:
    """The error for a peer that does not keep to the protocol."""
    return TrifoldError(f"{name} sent {what}: is it of the same version of Trifold?")
