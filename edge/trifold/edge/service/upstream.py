"""The edge's end of the link to the core."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Final, Never

import grpc.aio
from google.protobuf.message import DecodeError

from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import ConfigError, DeadlineExceeded, TrifoldError, Unavailable
from trifold.shared.session.announcement import announcement
from trifold.shared.session.channel import Connection, way
from trifold.shared.session.ending import Ending, nonsense
from trifold.shared.session.status import from_rpc_error
from trifold.shared.telemetry.metrics import traffic
from trifold.shared.telemetry.traces import Span

_CORE: Final = "/trifold.proto.v1.CoreService"

_OPEN_SECONDS: Final = 3.0
"""How long an Open waits for a core that is not there: one that restarts is worth a moment."""

_GOODBYE_SECONDS: Final = 1.0
"""How long a Close waits to be heard."""

log = logging.getLogger(__name__)

Call = grpc.aio.StreamStreamCall[bytes, bytes]


class Core:
    """The core at `address` (HOST:PORT), which may come and go; `timeout` seconds for each of its answers."""

    def __init__(
        self, address: str, timeout: float, *, tls: Path | None = None, insecure: bool = False
    ) -> None:
        """With TLS as the node of the folder `tls`; without, on loopback only, unless that is `insecure`.

        Raises ConfigError.
        """
        self.name = f"the core at {address}"
        self.timeout = timeout
        # gRPC tries on where TLS does not come about, and does not say so.
        self.tls_hint = " with TLS, a certificate for this host and the same authority" if tls else ""
        self._there = True
        self._connection = Connection(address, way(address, tls, insecure=insecure))

    @asynccontextmanager
    async def open(self, opening: pb.Open, span: Span) -> AsyncIterator[CoreStream]:
        """A stream that the core has answered with Opened, traced below `span`; leaving it ends the stream.

        Raises what the core answered, or Unavailable when it is not there.
        """
        method: grpc.aio.StreamStreamMultiCallable[bytes, bytes]
        method = self._connection.channel.stream_stream(f"{_CORE}/Session")
        call: Call = method(wait_for_ready=True, metadata=(*announcement(opening), *span.metadata))
        stream = CoreStream(self, call)
        try:
            await stream.open(opening)
            yield stream
        finally:
            stream.end()

    async def describe(self) -> pb.DescribeResponse:
        """Raises Unavailable when the core is not there, ConfigError where something else answers."""
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
        method = self._connection.channel.unary_unary(f"{_CORE}/Describe")
        request = pb.DescribeRequest().SerializeToString()
        try:
            data = await method(request, timeout=min(self.timeout, _OPEN_SECONDS))
            return pb.DescribeResponse.FromString(data)
        except grpc.aio.AioRpcError as error:
            raise _explained(from_rpc_error(error, self.name), self.name) from None
        except DecodeError:
            raise nonsense(self.name, "a description that is not one") from None

    def note(self, *, there: bool) -> None:
        """Logs when the core is gone, and when it is back."""
        if there != self._there:
            log.warning("%s is %s", self.name, "there again" if there else "not there")
        self._there = there

    async def close(self) -> None:
        await self._connection.close()


class CoreStream:
    """One session's stream to the core.

    Its methods raise what ended it: what the core answered, or Unavailable when it was lost.
    Whoever gives up waiting in receive() ends the call, as grpc.aio has it.
    """

    def __init__(self, core: Core, call: Call) -> None:
        self.opened = pb.Opened()
        self._core = core
        self._call = call
        self._ending = Ending(call, core.name)
        self._responses = aiter(call)
        self._sent = 0
        self._received = 0
        self._progress = 0.0
        self._writing = asyncio.Lock()
        self._traffic = traffic("edge-cloud")

    async def open(self, opening: pb.Open) -> None:
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                await self._write(pb.SessionRequest(open=opening))
                response, _ = await self._read()
        except TimeoutError:
            self._core.note(there=False)
            hint = f"is `trifold cloud serve` running{self._core.tls_hint}?"
            raise Unavailable(f"{self._core.name} is not there: {hint}", retry_after=1.0) from None
        self._core.note(there=True)
        if response.WhichOneof("kind") != "opened":
            raise self.nonsense("no Opened")
        self.opened = response.opened

    async def send(self, asked: pb.Header, codec: pb.Codec.ValueType, rows: bytes) -> int:
        """Sends the rows of a device's step on, and returns the bytes of the message.

        On a call that has ended this does nothing: receive() says what happened to it.
        """
        if self._sent == self._received:
            self._progress = monotonic()
        request = pb.SessionRequest(step=pb.Step(header=asked, rows=rows))
        request.step.header.seq = self._sent
        request.step.header.codec = codec
        self._sent += 1
        return await self._write(request)

    async def receive(self) -> tuple[pb.SessionResponse, int]:
        """The next result and the bytes of its message."""
        response, size = await self._read()
        if response.WhichOneof("kind") != "result" or response.result.header.seq != self._received:
            raise self.nonsense(f"something else than result {self._received}")
        self._received += 1
        self._progress = monotonic()
        return response, size

    async def lost(self) -> Never:
        """Waits until the stream ends, and raises why; DeadlineExceeded when the core has fallen silent."""
        patience = self._core.timeout
        ended = asyncio.ensure_future(self._call.code())
        while not ended.done():
            await asyncio.wait([ended], timeout=patience / 4)
            if self._sent > self._received and monotonic() - self._progress > patience:
                raise DeadlineExceeded(f"{self._core.name} sent no result for {patience:g} s")
        raise _explained(await self._ending.error(), self._core.name)

    async def close(self) -> None:
        """Tells the core that the session is over, and waits a moment until it has heard."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await self._write(pb.SessionRequest(close=pb.Close()))
                await self._call.code()

    def end(self) -> None:
        """Ends the call, if it has not ended."""
        self._call.cancel()

    def nonsense(self, what: str) -> TrifoldError:
        return nonsense(self._core.name, what)

    async def _write(self, request: pb.SessionRequest) -> int:
        data = request.SerializeToString()
        self._traffic.up(len(data))
        # Close may come while a step is still on its way out, and gRPC takes one message at a time.
        async with self._writing:
            # Why a call takes no more is what reading it tells.
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await self._call.write(data)
        return len(data)

    async def _read(self) -> tuple[pb.SessionResponse, int]:
        try:
            data = await anext(self._responses)
        except (grpc.aio.AioRpcError, StopAsyncIteration):
            raise _explained(await self._ending.error(), self._core.name) from None
        self._traffic.down(len(data))
        try:
            return pb.SessionResponse.FromString(data), len(data)
        except DecodeError:
            raise self.nonsense("a message that is not a SessionResponse") from None


def _explained(end: TrifoldError, core: str) -> TrifoldError:
    """What a call to the `core` ended with; it is told where nothing there is a core's service."""
    if isinstance(end, ConfigError):
        return ConfigError(f"{core}: an edge, the authority or something else answers there, not a core")
    return end
