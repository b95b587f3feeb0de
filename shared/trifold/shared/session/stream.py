"""The server's end of one stream: messages in and out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Final, Generic, TypeAlias, TypeVar

import grpc.aio
from google.protobuf.message import DecodeError, Message

from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import DeadlineExceeded, InvalidRequest, Unavailable
from trifold.shared.session.announcement import announces_new
from trifold.shared.telemetry.metrics import traffic
from trifold.shared.telemetry.traces import Span

OPEN_SECONDS: Final = 10.0
"""How long a stream may take to say Open."""


Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


class MessageStream(Generic[Request, Response]):
    """Reads requests and writes responses.

    Messages stay bytes until here, so that one that is not protobuf gets an answer of ours.
    Both raise Unavailable when the caller is lost.
    """

    def __init__(
        self,
        context: grpc.aio.ServicerContext[bytes, bytes],
        request: type[Request],
        *,
        tenant: str,
        link: str,
        span: Span,
    ) -> None:
        """Of a caller of `tenant`, which is empty without TLS, over `link`; `span` is that of the stream."""
        self.tenant = tenant
        self.span = span
        self.new = announces_new(context.invocation_metadata() or ())
        self._context = context
        self._request = request
        self._traffic = traffic(link)
        self.writing_since: float | None = None
        """Since when the caller has not taken an answer, on the clock of the event loop."""

    async def first(self) -> Request | None:
        """Begins the stream, and then as read(), with a deadline. Raises DeadlineExceeded."""
        # Ahead of everything that may be cut short, so that an error's status never sends them again.
        await self._context.send_initial_metadata(())
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                return await self.read()
        except TimeoutError:
            raise DeadlineExceeded(f"no Open within {OPEN_SECONDS:g} s of the stream's beginning") from None

    async def read(self) -> Request | None:
        """The next request; None when the caller has ended the stream. Raises InvalidRequest."""
        try:
            data: Any = await self._context.read()
        except grpc.aio.BaseError:
            raise _lost() from None
        if data is grpc.aio.EOF:
            return None
        self._traffic.up(len(data))
        try:
            return self._request.FromString(data)
        except DecodeError:
            name = self._request.DESCRIPTOR.name
            raise InvalidRequest(f"a message of {len(data)} bytes is not a {name}") from None

    async def write(self, response: Response) -> None:
        data = response.SerializeToString()
        self._traffic.down(len(data))
        self.writing_since = asyncio.get_running_loop().time()
        try:
            await self._context.write(data)
        except grpc.aio.BaseError:
            raise _lost() from None
        self.writing_since = None


Stream: TypeAlias = MessageStream[pb.SessionRequest, pb.SessionResponse]
"""The stream of a session."""


def _lost() -> Unavailable:
    return Unavailable("the caller of the stream was lost")


async def until_first(*awaitables: Awaitable[Any]) -> None:
    """Runs them side by side until the first ends, cancels the others, and raises its error."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
