"""A site's end of its stream to the training process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

import grpc.aio
from google.protobuf.message import DecodeError

from trifold.proto.v1 import train_pb2 as pb
from trifold.shared.errors import BadRows
from trifold.shared.session.ending import Ending, nonsense
from trifold.shared.session.pieces import joined

_GOODBYE_SECONDS: Final = 1.0
"""How long a Close waits to be heard."""

Call = grpc.aio.StreamStreamCall[bytes, bytes]


class TrainStream:
    """One stream to the training process. `sent` and `received` are the bytes of the last question.

    Methods raise what ended it: what the process answered, or Unavailable when it was lost. `heard` is called
    for every message of an answer.
    """

    def __init__(self, call: Call, name: str, heard: Callable[[], None]) -> None:
        self.opened = pb.TrainOpened()
        self.sent = 0
        self.received = 0
        self._name = name
        self._heard = heard
        self._call = call
        self._ending = Ending(call, name)
        self._responses = aiter(call)

    async def open(self, opening: pb.TrainOpen) -> None:
        await self._write(pb.TrainRequest(open=opening))
        response = await self._read("opened")
        self.opened = response.opened

    async def ask(
        self, request: pb.TrainRequest, rest: Iterable[bytes], size: int
    ) -> tuple[pb.Computed, bytes | bytearray]:
        """The answer to a batch that begins with `request`, and its data: `size` bytes, none if forgotten."""
        self.sent = self.received = 0
        await self._write(request)
        for data in rest:
            await self._write(pb.TrainRequest(piece=pb.Piece(data=data)))
        answer = (await self._answer("computed")).computed
        asked = request.forward.batch if request.HasField("forward") else request.backward.batch
        if answer.batch != asked:
            raise nonsense(self._name, "the answer to another batch")
        if answer.forgotten:
            return answer, b""
        try:
            return answer, await joined(answer.data, size, self._piece)
        except BadRows as error:
            raise nonsense(self._name, error.message) from None

    async def close(self) -> None:
        """Tells the process that the site is done, and waits a moment until it has heard."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await self._write(pb.TrainRequest(close=pb.TrainClose()))
                await self._call.code()
        self.end()

    def end(self) -> None:
        """Ends the call, if it has not ended."""
        self._call.cancel()

    async def _piece(self) -> bytes:
        return (await self._answer("piece")).piece.data

    async def _answer(self, kind: str) -> pb.TrainResponse:
        response = await self._read(kind)
        self._heard()
        return response

    async def _write(self, request: pb.TrainRequest) -> None:
        data = request.SerializeToString()
        self.sent += len(data)
        # Why a call takes no more is what reading it tells.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._call.write(data)

    async def _read(self, kind: str) -> pb.TrainResponse:
        try:
            data = await anext(self._responses)
        except (grpc.aio.AioRpcError, StopAsyncIteration):
            raise await self._ending.error() from None
        self.received += len(data)
        try:
            response = pb.TrainResponse.FromString(data)
        except DecodeError:
            raise nonsense(self._name, "a message that is not a TrainResponse") from None
        if response.WhichOneof("kind") != kind:
            raise nonsense(self._name, f"{response.WhichOneof('kind') or 'nothing'} instead of {kind}")
        return response
