"""What the tests of the training process share: one in this process, and its wire spoken by hand."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np

from tests.shared import sites
from trifold.cloud.train.service import TrainService
from trifold.proto.v1 import train_pb2 as pb
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.errors import TrifoldError
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.session.channel import connect
from trifold.shared.session.ending import Ending
from trifold.shared.session.server import TierServer
from trifold.shared.session.status import from_rpc_error
from trifold.shared.training import wire
from trifold.shared.training.shard import TorchShard
from trifold.shared.training.wire import Batch

SEQUENCES, LENGTH = 2, 8
MEMORY = 1 << 30


@cache
def shard(bundle: Path) -> TorchShard:
    """The core in torch, loaded once for all tests."""
    return sites.shard(bundle, "cloud")


@dataclass
class RunningTraining:
    service: TrainService
    server: TierServer
    channel: grpc.aio.Channel

    @property
    def codec(self) -> RowCodec:
        return self.service.frames.rows

    def call(self) -> TrainTalk:
        """A stream that has not said anything."""
        return TrainTalk(self.channel.stream_stream("/trifold.proto.v1.TrainService/Train")(), self)

    async def opened(self, **fields: Any) -> TrainTalk:
        talk = self.call()
        await talk.open(**fields)
        return talk

    async def describe(self, request: bytes = b"") -> pb.TrainDescribeResponse:
        method: Any = self.channel.unary_unary("/trifold.proto.v1.TrainService/Describe")
        try:
            return pb.TrainDescribeResponse.FromString(await method(request, timeout=20))
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None


@asynccontextmanager
async def running_training(
    bundle: Path,
    *,
    memory: int = MEMORY,
    row_memory: int = MEMORY,
    lease: float = 30.0,
    tls: Path | None = None,
) -> AsyncIterator[RunningTraining]:
    manifest = TierFolder.open(bundle, "cloud").manifest
    service = TrainService(shard(bundle), manifest, memory=memory, row_memory=row_memory, lease=lease)
    server = TierServer(service)
    await server.start("127.0.0.1:0", tls=tls)
    async with connect(server.address) as channel:
        try:
            yield RunningTraining(service, server, channel)
        finally:
            await server.stop()


class TrainTalk:
    """One stream to a training process, rows and gradients in the bundle's codec."""

    def __init__(self, call: Any, training: RunningTraining) -> None:
        self._call = call
        self._responses = aiter(call)
        self._ending = Ending(call, "the training process")
        self._digest = training.service.digest
        self._codec = training.codec
        self.session = b""

    async def open(self, **fields: Any) -> pb.TrainOpened:
        fields = {"session": secrets.token_bytes(16), "gradients": self._codec.wire, **fields}
        self.session = fields["session"]
        await self.say(pb.TrainRequest(open=pb.TrainOpen(**{"serving_digest": self._digest, **fields})))
        return (await self.hear("opened")).opened

    def batch(self, number: int = 1, **fields: Any) -> pb.Batch:
        honest = {"id": number, "sequences": SEQUENCES, "length": LENGTH, "codec": self._codec.wire}
        return pb.Batch(**{**honest, **fields})

    async def forward(self, rows: Batch, number: int = 1, *, keep: bool = True) -> Batch:
        data = wire.encode(rows, self._codec)
        batch = self.batch(number, sequences=rows.shape[0], length=rows.shape[1])
        await self.say(pb.TrainRequest(forward=pb.Forward(batch=batch, keep=keep, data=data)))
        return self._decoded((await self.hear("computed")).computed)

    async def backward(self, gradients: Batch, number: int = 1) -> tuple[pb.Computed, Batch]:
        """The answer and its gradients, which are none for a batch that is forgotten."""
        data = wire.encode(gradients, self._codec)
        batch = self.batch(number, sequences=gradients.shape[0], length=gradients.shape[1])
        await self.say(pb.TrainRequest(backward=pb.Backward(batch=batch, data=data)))
        answer = (await self.hear("computed")).computed
        return answer, np.zeros(0, np.float32) if answer.forgotten else self._decoded(answer)

    async def say(self, request: pb.TrainRequest | bytes) -> None:
        """Sends anything at all; a call that has ended takes no notice."""
        data = request if isinstance(request, bytes) else request.SerializeToString()
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._call.write(data)

    async def hear(self, kind: str) -> pb.TrainResponse:
        """The next response. Raises the error that ended the stream."""
        try:
            async with asyncio.timeout(30):
                response = pb.TrainResponse.FromString(await anext(self._responses))
        except grpc.aio.AioRpcError:
            raise await self._ending.error() from None
        assert response.WhichOneof("kind") == kind
        return response

    async def end(self) -> TrifoldError | None:
        """Hears the stream out, and returns the error it ended with."""
        try:
            async with asyncio.timeout(30):
                async for _ in self._responses:
                    pass
        except grpc.aio.AioRpcError:
            return await self._ending.error()
        return None

    async def finish(self) -> TrifoldError | None:
        """Says that there is no more to say, and returns what the stream ends with."""
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._call.done_writing()
        return await self.end()

    async def close(self) -> None:
        await self.say(pb.TrainRequest(close=pb.TrainClose()))
        assert await self.end() is None

    def drop(self) -> None:
        """Ends the call without a word, as a crash would."""
        self._call.cancel()

    def _decoded(self, computed: pb.Computed) -> Batch:
        batch = computed.batch
        return wire.decode(computed.data, batch.sequences, batch.length, self._codec)


def some(codec: RowCodec, seed: int = 0, sequences: int = SEQUENCES, length: int = LENGTH) -> Batch:
    """Random rows or gradients."""
    shape = sequences, length, codec.hidden
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
