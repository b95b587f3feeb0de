"""The server's end of one stream: messages in and out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Final

import grpc.aio
from google.protobuf.message import DecodeError

from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import DeadlineExceeded, InvalidRequest, Unavailable

OPEN_SECONDS: Final = 10.0
"""How long a stream may take to say Open."""


class Stream:
    """Reads requests and writes responses.

    Messages stay bytes until here, so that one that is not protobuf gets an answer of ours.
    Both raise Unavailable when the caller is lost.
    """

    def __init__(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        self._context = context

    async def first(self) -> pb.SessionRequest | None:
        """As read(), with a deadline. Raises DeadlineExceeded."""
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                return await self.read()
        except TimeoutError:
            raise DeadlineExceeded(f"no Open within {OPEN_SECONDS:g} s of the stream's beginning") from None

    async def read(self) -> pb.SessionRequest | None:
        """The next request; None when the caller has ended the stream. Raises InvalidRequest."""
        try:
            data: Any = await self._context.read()
        except grpc.aio.BaseError:
            raise _lost() from None
        if data is grpc.aio.EOF:
            return None
        try:
            return pb.SessionRequest.FromString(data)
        except DecodeError:
            raise InvalidRequest(f"a message of {len(data)} bytes is not a SessionRequest") from None

    async def write(self, response: pb.SessionResponse) -> None:
        try:
            await self._context.write(response.SerializeToString())
        except grpc.aio.BaseError:
            raise _lost() from None


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
