"""The wire, spoken by hand: what tests say to a service, rightly or wrongly."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import grpc.aio
import numpy as np
from numpy.typing import NDArray

from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import TrifoldError
from trifold.shared.identity.node import Node
from trifold.shared.runtime.codec import RowCodec, Rows
from trifold.shared.session.channel import CHANNEL_OPTIONS, connect
from trifold.shared.session.ending import Ending
from trifold.shared.session.status import from_rpc_error

Name = Literal["EdgeService", "CoreService"]


class Peer:
    """A channel to one service, as an edge or a device has it."""

    def __init__(self, channel: grpc.aio.Channel, name: Name) -> None:
        self._session: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(
            f"/trifold.proto.v1.{name}/Session"
        )
        self._describe: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            f"/trifold.proto.v1.{name}/Describe"
        )

    @classmethod
    @asynccontextmanager
    async def at(cls, address: str, name: Name, tls: Path | None = None) -> AsyncIterator[Peer]:
        async with connect(address, Node(tls) if tls else None) as channel:
            yield cls(channel, name)

    @classmethod
    @asynccontextmanager
    async def apart(cls, address: str, name: Name) -> AsyncIterator[Peer]:
        """As from another machine: over a connection that is shared with nobody."""
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options) as channel:
            yield cls(channel, name)

    def call(self, *metadata: tuple[str, str]) -> Talk:
        return Talk(self._session(wait_for_ready=True, metadata=metadata))

    async def describe(self, request: bytes = b"") -> pb.DescribeResponse:
        try:
            return pb.DescribeResponse.FromString(await self._describe(request, timeout=20))
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None


class Talk:
    """One stream. What it raises is what the service answered."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._responses = aiter(call)
        self._ending = Ending(call, "the service")
        self.session = b""
        self.epoch = 0
        self.seq = 0

    async def say(self, request: pb.SessionRequest | bytes) -> None:
        """Sends anything at all; a call that has ended takes no notice."""
        data = request if isinstance(request, bytes) else request.SerializeToString()
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._call.write(data)

    async def hear(self) -> pb.SessionResponse | None:
        """The next response, None at the end of the stream. Raises the error that ended it."""
        try:
            async with asyncio.timeout(30):
                data = await anext(self._responses, None)
        except grpc.aio.AioRpcError:
            raise await self._ending.error() from None
        return None if data is None else pb.SessionResponse.FromString(data)

    async def open(self, digest: str, capacity: int = 64, **fields: Any) -> pb.Opened:
        """Opens a new session, or with `session` and `epoch` another incarnation of one."""
        fields = {"session": secrets.token_bytes(16), "epoch": 1, **fields}
        self.session, self.epoch = fields["session"], fields["epoch"]
        opening = pb.Open(serving_digest=digest, capacity=capacity, **fields)
        await self.say(pb.SessionRequest(open=opening))
        response = await self.hear()
        assert response is not None
        assert response.WhichOneof("kind") == "opened"
        return response.opened

    def step(self, base_pos: int, rows: int, **fields: Any) -> pb.SessionRequest:
        """The next step of this stream, but for what `fields` say otherwise of its header or payload."""
        payload = {key: fields.pop(key) for key in ("tokens", "rows_data") if key in fields}
        header = {
            "session": self.session,
            "epoch": self.epoch,
            "seq": self.seq,
            "base_pos": base_pos,
            "rows": rows,
            "logits_from": base_pos,
            **fields,
        }
        self.seq += 1
        step = pb.Step(header=pb.Header(**header))
        if "tokens" in payload:
            step.tokens.ids.extend(payload["tokens"])
            step.tokens.SetInParent()
        if "rows_data" in payload:
            step.rows = payload["rows_data"]
        return pb.SessionRequest(step=step)

    async def send_tokens(self, ids: Sequence[int] | NDArray[np.int64], base_pos: int, **fields: Any) -> None:
        await self.say(self.step(base_pos, len(ids), tokens=[int(i) for i in ids], **fields))

    async def send_rows(self, codec: RowCodec, rows: Rows, base_pos: int, **fields: Any) -> None:
        data = codec.encode(rows, base_pos)
        await self.say(self.step(base_pos, len(rows), rows_data=data, codec=codec.wire, **fields))

    async def result(self) -> pb.Result:
        response = await self.hear()
        assert response is not None
        assert response.WhichOneof("kind") == "result"
        return response.result

    async def end(self) -> TrifoldError | None:
        """Hears the stream out, and returns the error it ended with."""
        try:
            while await self.hear() is not None:
                pass
        except TrifoldError as error:
            return error
        return None

    async def close(self) -> None:
        """Says Close, and waits until the service has done its part."""
        await self.say(pb.SessionRequest(close=pb.Close()))
        assert await self.end() is None

    async def finish(self) -> None:
        """Says that there is no more to say."""
        await self._call.done_writing()

    async def hang_up(self) -> None:
        """Leaves in order, but without a Close."""
        await self.finish()
        await self.end()

    async def drop(self) -> None:
        """Ends the call without a word, as a crash would."""
        self._call.cancel()


def decoded(codec: RowCodec, result: pb.Result) -> Rows:
    """The rows of a result."""
    return codec.decode(result.rows, result.header.rows, result.header.base_pos)
