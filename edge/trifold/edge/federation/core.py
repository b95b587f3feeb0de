"""RemoteCore: the frozen core of the training process, as a site trains around it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Never, Self, TypeVar

import grpc.aio
from google.protobuf.message import DecodeError

from trifold.edge.federation.train_stream import TrainStream
from trifold.proto.v1 import train_pb2 as pb
from trifold.shared.bundle.manifest import CodecName, Manifest
from trifold.shared.errors import (
    BadRows,
    Cancelled,
    DeadlineExceeded,
    DigestMismatch,
    InvalidRequest,
    Overloaded,
    TrifoldError,
    Unavailable,
)
from trifold.shared.identity.keeper import Keeper
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.session.channel import Connection, way
from trifold.shared.session.ending import nonsense
from trifold.shared.session.frames import SESSION_BYTES
from trifold.shared.session.pieces import pieces
from trifold.shared.session.status import from_rpc_error
from trifold.shared.training import wire
from trifold.shared.training.wire import Batch

_TRAIN: Final = "/trifold.proto.v1.TrainService"

_PAUSE: Final = 0.2
"""Seconds between two attempts to reach a training process that turns a site away."""

_LOOK_SECONDS: Final = 10.0
"""How long a training process may take to say that it is there."""

_PASSING: Final = (Unavailable, Overloaded, DeadlineExceeded, Cancelled)

T = TypeVar("T")


@dataclass(frozen=True)
class _Sent:
    """Rows that went forward and may have to go once more."""

    batch: pb.Batch
    data: bytes


class RemoteCore:
    """The core at `address` (HOST:PORT) for one site, as `Core` of shared/training/site.py describes it.

    Blocking, for one thread at a time and not for one that runs an event loop. A training process that is
    lost, or has forgotten a batch, is asked again with the same bytes, which gives the same gradients. One
    that is busy with other sites' batches is waited for.

    `traffic` counts the bytes of messages. Both ways raise Unavailable when nothing was answered for
    `timeout` seconds and the process is not there, turns the site away or goes on with nobody's batch;
    DigestMismatch when it has another bundle, and whatever it refuses a batch with.
    """

    def __init__(
        self,
        address: str,
        manifest: Manifest,
        gradients: CodecName = "int8",
        *,
        timeout: float = 120.0,
        tls: Path | None = None,
        insecure: bool = False,
    ) -> None:
        """Calls nobody yet. Rows travel in the codec of the bundle, gradients in `gradients`.

        With TLS as the node of the folder `tls`; without, on loopback only, unless that is `insecure`.
        Raises ConfigError.
        """
        serving = manifest.serving
        self.traffic = pb.Traffic()
        self._name = f"the training process at {address}"
        self._timeout = timeout
        self._rows = RowCodec(serving.codec, serving.spec.hidden)
        self._gradients = RowCodec(gradients, serving.spec.hidden)
        self._opening = pb.TrainOpen(
            session=secrets.token_bytes(SESSION_BYTES),
            serving_digest=manifest.serving_digest,
            gradients=self._gradients.wire,
        )
        self._batches: OrderedDict[int, _Sent] = OrderedDict()
        self._last = 0
        self._heard = 0.0
        self._problem = ""
        self._runner = asyncio.Runner()
        self._node = way(address, tls, insecure=insecure)
        self._connection = Connection(address, self._node)
        self._keeping: asyncio.Task[Never] | None = None
        self._stream: TrainStream | None = None

    def forward(self, rows: Batch, *, keep: bool) -> tuple[int, Batch]:
        """The core's rows for the edge's (sequences, length, hidden), and the batch's number.

        Raises InvalidRequest for more rows than the training process takes in one batch.
        """
        self._last += 1
        sequences, length, _ = rows.shape
        batch = pb.Batch(id=self._last, sequences=sequences, length=length, codec=self._rows.wire)
        sent = _Sent(batch, wire.encode(rows, self._rows))
        data = self._run(lambda stream: self._forward(stream, sent, keep=keep))
        return batch.id, self._decoded(data, batch, self._rows)

    def backward(self, batch: int, gradients: Batch) -> Batch:
        """Gradients of the edge's rows from those of the core's rows, once for each batch.

        Raises InvalidRequest for a batch that is not held.
        """
        if batch not in self._batches:
            raise InvalidRequest(
                f"batch {batch} awaits no gradients: it was not kept, or others pushed it out"
            )
        sent = self._batches[batch]
        data = wire.encode(gradients, self._gradients)
        answer = self._run(lambda stream: self._backward(stream, sent, data))
        del self._batches[batch]
        return self._decoded(answer, sent.batch, self._gradients)

    def check(self) -> None:
        """Raises Unavailable when no training process is there now, DigestMismatch for another bundle."""
        self._runner.run(self._check())

    def close(self) -> None:
        """Lets the training process forget this site; the core cannot be used again."""
        self._runner.run(self._close())
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, work: Callable[[TrainStream], Awaitable[T]]) -> T:
        return self._runner.run(self._persist(work))

    async def _persist(self, work: Callable[[TrainStream], Awaitable[T]]) -> T:
        """Does the work, as long as the process goes on with it or with that of other sites."""
        doing = asyncio.create_task(self._repeat(work))
        if self._node and self._keeping is None:
            # It goes on whenever there is work: the loop stands still in between, and so does this.
            self._keeping = asyncio.create_task(Keeper(self._node).run())
        seen: pb.Traffic | None = None
        self._problem = ""
        self._listen()
        try:
            while not doing.done():
                silence = time.monotonic() - self._heard
                if silence < self._timeout:
                    await asyncio.wait({doing}, timeout=self._timeout - silence)
                else:
                    seen = await self._look(seen)
                    self._listen()
            return doing.result()
        except BaseException:
            doing.cancel()
            await asyncio.wait({doing})
            # Whatever it was, an answer to it may still come: nothing else can be asked on this stream.
            self._hang_up()
            raise

    def _listen(self) -> None:
        """The time of silence begins anew."""
        self._heard = time.monotonic()

    async def _look(self, seen: pb.Traffic | None) -> pb.Traffic:
        """What the process has done for all sites, which is more than was `seen`. Raises Unavailable."""
        silent = f"for {self._timeout:g} s"
        try:
            traffic = (await self._describe()).traffic
        except TrifoldError as error:
            hint = f"is `trifold cloud train` running? ({self._problem or error.message})"
            raise Unavailable(f"{self._name} gave no answer {silent}: {hint}") from None
        if self._problem:
            raise Unavailable(f"{self._name} has turned this site away {silent}: {self._problem}")
        if traffic == seen:
            hint = "does a batch take it longer? Give `trifold edge train` a longer --timeout"
            raise Unavailable(f"{self._name} is there, and has answered no site {silent}: {hint}")
        return traffic

    async def _repeat(self, work: Callable[[TrainStream], Awaitable[T]]) -> T:
        """Does the work on a stream, and all of it on another one where that was lost."""
        while True:
            try:
                return await work(await self._connected())
            except _PASSING as error:
                self._problem = error.message
                self._hang_up()
                await asyncio.sleep(error.retry_after or _PAUSE)

    async def _connected(self) -> TrainStream:
        """The stream there is, or a new one."""
        if self._stream is None:
            method: grpc.aio.StreamStreamMultiCallable[bytes, bytes]
            method = self._connection.channel.stream_stream(f"{_TRAIN}/Train")
            self._stream = TrainStream(method(wait_for_ready=True), self._name, self._listen)
            await self._stream.open(self._opening)
            self._problem = ""
        return self._stream

    async def _forward(self, stream: TrainStream, sent: _Sent, *, keep: bool) -> bytes | bytearray:
        batch = sent.batch
        if batch.sequences * batch.length > stream.opened.max_rows:
            raise InvalidRequest(
                f"a batch of {batch.sequences} sequences of {batch.length} rows is more than the "
                f"{stream.opened.max_rows} rows that {self._name} takes: accumulate smaller ones"
            )
        first, *rest = pieces(sent.data)
        request = pb.TrainRequest(forward=pb.Forward(batch=batch, keep=keep, data=first))
        try:
            _, data = await stream.ask(request, rest, len(sent.data))
        finally:
            self.traffic.rows_up += stream.sent
            self.traffic.rows_down += stream.received
        if keep:
            self._batches[batch.id] = sent
            while len(self._batches) > stream.opened.max_batches:
                self._batches.popitem(last=False)
        return data

    async def _backward(self, stream: TrainStream, sent: _Sent, data: bytes) -> bytes | bytearray:
        """As often as needed: a batch that was forgotten goes forward first."""
        batch = pb.Batch()
        batch.CopyFrom(sent.batch)
        batch.codec = self._gradients.wire
        first, *rest = pieces(data)
        request = pb.TrainRequest(backward=pb.Backward(batch=batch, data=first))
        try:
            answer, result = await stream.ask(request, rest, len(data))
        finally:
            self.traffic.gradients_up += stream.sent
            self.traffic.gradients_down += stream.received
        if not answer.forgotten:
            return result
        await self._forward(stream, sent, keep=True)
        return await self._backward(stream, sent, data)

    async def _describe(self) -> pb.TrainDescribeResponse:
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
        method = self._connection.channel.unary_unary(f"{_TRAIN}/Describe")
        request = pb.TrainDescribeRequest().SerializeToString()
        try:
            answer = await method(request, timeout=_LOOK_SECONDS)
            return pb.TrainDescribeResponse.FromString(answer)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self._name) from None
        except DecodeError:
            raise nonsense(self._name, "a description that is not one") from None

    async def _check(self) -> None:
        try:
            theirs = (await self._describe()).serving_digest
        except Unavailable as error:
            hint = "is `trifold cloud train` running?"
            raise Unavailable(f"{self._name} is not there: {hint} ({error.message})") from None
        mine = self._opening.serving_digest
        if theirs != mine:
            raise DigestMismatch(f"the site holds the bundle {mine[:12]}, {self._name} has {theirs[:12]}")

    async def _close(self) -> None:
        if self._stream is not None:
            await self._stream.close()
        if self._keeping is not None:
            self._keeping.cancel()
        await self._connection.close()

    def _hang_up(self) -> None:
        if self._stream is not None:
            self._stream.end()
            self._stream = None

    def _decoded(self, data: bytes | bytearray, batch: pb.Batch, codec: RowCodec) -> Batch:
        try:
            return wire.decode(data, batch.sequences, batch.length, codec)
        except BadRows as error:
            raise nonsense(self._name, error.message) from None
