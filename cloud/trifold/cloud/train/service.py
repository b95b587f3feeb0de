"""The training process: rows of sites through the frozen core, and gradients back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from typing import ClassVar, Final, Literal

import torch
from prometheus_client.core import Metric

from trifold.cloud.train import accelerator
from trifold.cloud.train.activations import Held
from trifold.cloud.train.core import FrozenCore, Product
from trifold.cloud.train.frames import TrainFrames
from trifold.cloud.train.sites import MOST_BATCHES, Seat, SiteTable, leaving
from trifold.proto.v1 import session_pb2
from trifold.proto.v1 import train_pb2 as pb
from trifold.shared.bundle.manifest import Manifest
from trifold.shared.errors import InvalidRequest
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.session.pieces import joined, pieces
from trifold.shared.session.scheduler import Turn, TurnScheduler
from trifold.shared.session.stream import MessageStream, until_first
from trifold.shared.telemetry import metrics
from trifold.shared.training.shard import TorchShard

TrainStream = MessageStream[pb.TrainRequest, pb.TrainResponse]
Upward = Literal["rows_up", "gradients_up"]

_BATCHES: Final = metrics.Turns("batch")


class TrainService:
    """Trains many sites with one core, in turns of a batch each."""

    name: ClassVar = pb.DESCRIPTOR.services_by_name["TrainService"].full_name
    link: ClassVar = "site-cloud"
    counted: ClassVar = metrics.TRAINING

    def __init__(
        self, shard: TorchShard, manifest: Manifest, *, memory: int, row_memory: int, lease: float
    ) -> None:
        """Activations of all sites may take `memory` bytes, the rows of batches held `row_memory`.

        A lost site is held for `lease` seconds.
        """
        self.frames = TrainFrames(manifest, row_memory)
        self.core = FrozenCore(shard, self.frames.rows, memory)
        self.scheduler = TurnScheduler()
        self.table = SiteTable(self.core.activations, self.scheduler, memory=row_memory, lease=lease)
        self.traffic = pb.Traffic()
        self.info = session_pb2.TierInfo(
            tier="cloud",
            version=version("trifold"),
            fingerprint=f"torch-{torch.__version__}/{accelerator.describe(shard.device)}",
            provider=shard.device.type.upper(),
            exact=True,
        )

    @property
    def digest(self) -> str:
        return self.frames.digest

    async def session(self, stream: TrainStream) -> None:
        """One stream, from Open to its end. Raises the TrifoldError that ends it."""
        opening = self.frames.opening(await stream.first())
        with self.table.seat(opening.session, stream.tenant) as seat:
            conversation = TrainConversation(self, stream, seat, self.frames.gradients(opening))
            await until_first(seat.lost, conversation.run())

    async def describe(self) -> pb.TrainDescribeResponse:
        """What this process is and how busy."""
        return pb.TrainDescribeResponse(
            serving_digest=self.digest,
            max_rows=self.frames.max_rows,
            sites=len(self.table),
            batches=self.table.batches,
            activation_bytes=self.core.activations.size,
            activation_bytes_limit=self.core.activations.limit,
            row_bytes=self.table.row_bytes,
            row_bytes_limit=self.table.memory,
            recomputed=self.core.recomputed,
            traffic=self.traffic,
            draining=self.table.draining,
            tier=self.info,
        )

    def readings(self) -> Iterator[Metric]:
        """What its metrics are now, besides those that it counts; any thread may ask."""
        activations = self.core.activations
        yield metrics.TRAIN_SITES.of(len(self.table))
        yield metrics.TRAIN_BATCHES.of(self.table.batches)
        yield metrics.TRAIN_ACTIVATIONS.of(activations.size)
        yield metrics.TRAIN_ACTIVATIONS_LIMIT.of(activations.limit)
        yield metrics.TRAIN_RECOMPUTED.of(self.core.recomputed)
        yield from metrics.build(self.info, self.digest)

    async def close(self) -> None:
        """Stops the engine after the batch that it is at."""
        self.scheduler.stop()


class TrainConversation:
    """One site's batches, each answered before the next is read: other sites have their turns meanwhile."""

    def __init__(self, service: TrainService, stream: TrainStream, seat: Seat, gradients: RowCodec) -> None:
        self._service = service
        self._stream = stream
        self._seat = seat
        self._gradients = gradients
        self._traffic = service.traffic

    async def run(self) -> None:
        """Goes on until the site closes or leaves. Raises what is wrong with a request."""
        await self._stream.write(pb.TrainResponse(opened=self._opened()))
        while (request := await self._stream.read()) is not None:
            self._seat.idle = False
            match request.WhichOneof("kind"):
                case "forward":
                    await self._forward(request)
                case "backward":
                    await self._backward(request)
                case "close":
                    self._seat.closed = True
                    return
                case kind:
                    wanted = "a Forward, Backward or Close"
                    raise InvalidRequest(f"{kind or 'nothing'} where {wanted} is expected")
            self._seat.idle = True
            if self._service.table.draining:
                raise leaving()

    def _opened(self) -> pb.TrainOpened:
        return pb.TrainOpened(
            max_rows=self._service.frames.max_rows,
            max_batches=MOST_BATCHES,
            lease_ms=round(self._service.table.lease * 1000),
            tier=self._service.info,
        )

    async def _forward(self, request: pb.TrainRequest) -> None:
        batch, frames = request.forward.batch, self._service.frames
        size = frames.size(batch, frames.rows)
        if request.forward.keep:
            self._seat.make_room(size)
        data = await self._gather(request, request.forward.data, size, "rows_up")
        held = Held(data, batch.sequences, batch.length)
        if request.forward.keep:
            self._seat.hold(batch.id, held)
        turn = await self._turn(partial(self._service.core.forward, held, keep=request.forward.keep))
        self._traffic.rows_down += await self._answer(pb.Computed(batch=batch), turn)

    async def _backward(self, request: pb.TrainRequest) -> None:
        batch, frames = request.backward.batch, self._service.frames
        size = frames.size(batch, self._gradients)
        held = self._seat.site.batches.get(batch.id)
        if held and held.shape != (batch.sequences, batch.length):
            given = f"gradients of {batch.sequences} sequences of {batch.length}"
            raise InvalidRequest(f"{given} for {held.sequences} of {held.length}")
        data = await self._gather(request, request.backward.data, size, "gradients_up")
        if held is None:
            await self._stream.write(pb.TrainResponse(computed=pb.Computed(batch=batch, forgotten=True)))
            return
        turn = await self._turn(partial(self._service.core.backward, held, data, self._gradients))
        self._traffic.gradients_down += await self._answer(pb.Computed(batch=batch), turn)
        # Not before the answer has left: a site that lost it asks again.
        self._seat.release(batch.id)

    async def _gather(
        self, request: pb.TrainRequest, first: bytes, size: int, counter: Upward
    ) -> bytes | bytearray:
        """All `size` bytes of a batch that begins in `request`; each message is counted as it comes."""
        self._count(counter, request)

        async def more() -> bytes:
            message = await self._stream.read()
            kind = message.WhichOneof("kind") if message else None
            if message is None or kind != "piece":
                raise InvalidRequest(f"{kind or 'nothing'} where the next Piece of a batch is expected")
            self._count(counter, message)
            return message.piece.data

        return await joined(first, size, more)

    def _count(self, counter: Upward, message: pb.TrainRequest) -> None:
        setattr(self._traffic, counter, getattr(self._traffic, counter) + message.ByteSize())

    async def _turn(self, work: Callable[[], Product]) -> Turn[Product]:
        turn = await self._service.scheduler.run(self._seat, work)
        _BATCHES.observe(turn.queue_ns, turn.compute_ns)
        return turn

    async def _answer(self, computed: pb.Computed, turn: Turn[Product]) -> int:
        """Sends what a turn gave; returns the bytes of its messages."""
        first, *rest = pieces(turn.value.data)
        computed.data, computed.recomputed = first, turn.value.recomputed
        computed.queue_ns, computed.compute_ns = turn.queue_ns, turn.compute_ns
        answer = pb.TrainResponse(computed=computed)
        sent = answer.ByteSize()
        await self._stream.write(answer)
        for data in rest:
            answer = pb.TrainResponse(piece=pb.Piece(data=data))
            sent += answer.ByteSize()
            await self._stream.write(answer)
        return sent
