"""The gRPC server of a tier or of the training process: brought up, and drained on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Never, Protocol, TypeVar

import grpc.aio
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from grpc_health.v1.health import aio as health
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import InvalidRequest, TrifoldError, Unavailable
from trifold.shared.identity.gate import tenant_of
from trifold.shared.session.door import Door
from trifold.shared.session.status import abort, public
from trifold.shared.session.stream import MessageStream, until_first
from trifold.shared.session.watchdog import watched
from trifold.shared.telemetry import traces
from trifold.shared.telemetry.exposition import metrics_shown
from trifold.shared.telemetry.request import begin_request

_FAREWELL: Final = 0.5
"""Seconds that the last statuses get to leave."""

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

log = logging.getLogger(__name__)

T = TypeVar("T")

Context = grpc.aio.ServicerContext[bytes, bytes]


class Callers(Protocol):
    """Who has a stream to a service."""

    async def drain(self) -> None:
        """Admits nobody any more, and waits until the last stream has left."""
        ...

    def evict_all(self, error: TrifoldError) -> None:
        """Ends every stream with this error."""
        ...


class Service(Protocol):
    """What a server serves: a call that is a stream of messages either way, and Describe."""

    @property
    def name(self) -> str:
        """The full name of the service in its .proto, which says how its calls are named and typed."""
        ...

    @property
    def link(self) -> str:
        """What its calls come over."""
        ...

    @property
    def counted(self) -> Collection[Collector]:
        """The metrics that it counts."""
        ...

    @property
    def info(self) -> pb.TierInfo: ...

    @property
    def digest(self) -> str:
        """The serving digest."""
        ...

    @property
    def table(self) -> Callers: ...

    def session(self, stream: MessageStream[Any, Any]) -> Awaitable[None]:
        """One stream, from its first message to its end. Raises the TrifoldError that ends it."""
        ...

    def describe(self) -> Awaitable[Message]: ...

    def readings(self) -> Iterable[Metric]:
        """What its metrics are now, besides those that it counts; any thread may ask."""
        ...

    async def close(self) -> None: ...


class TierServer:
    """Serves one service at `address` from start() to stop()."""

    def __init__(self, service: Service) -> None:
        self.address = ""
        self._service = service
        self._health = health.HealthServicer()
        self._door: Door | None = None

    async def start(self, listen: str, *, tls: Path | None = None, insecure: bool = False) -> None:
        """Listens at HOST:PORT; port 0 takes a free one.

        With TLS as the node of the folder `tls`; without, on loopback only, unless that is `insecure`.
        Raises ConfigError where that is impossible.
        """
        self._door = Door(listen, self._service.name, tls, insecure=insecure)
        for server in self._door.servers:
            self._serve_at(server)
        self.address = await self._door.open()
        await self._announce(health_pb2.HealthCheckResponse.SERVING)

    def readings(self) -> Iterator[Metric]:
        """Those of the service, and of its certificate."""
        yield from self._service.readings()
        if self._door:
            yield from self._door.readings()

    async def drain(self, grace: float) -> None:
        """Admits no more sessions, and gives those that run `grace` seconds to end."""
        await self._announce(health_pb2.HealthCheckResponse.NOT_SERVING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._service.table.drain()

    async def stop(self) -> None:
        """Ends what still runs with UNAVAILABLE, so that it is resumed elsewhere or later."""
        self._service.table.evict_all(Unavailable("the service is shutting down: resume the session"))
        if self._door:
            await self._door.close(_FAREWELL)
        await self._service.close()

    def _serve_at(self, server: grpc.aio.Server) -> None:
        """Its service, health and reflection."""
        name = self._service.name
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for method in descriptor_pool.Default().FindServiceByName(name).methods:
            request = message_factory.GetMessageClass(method.input_type)
            if method.client_streaming:
                handlers[method.name] = grpc.stream_stream_rpc_method_handler(self._stream(request))
            else:
                handlers[method.name] = grpc.unary_unary_rpc_method_handler(self._description(request))
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, handlers)])
        add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((name, HEALTH, reflection.SERVICE_NAME), server)

    async def _announce(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", self._service.name):
            await self._health.set(name, status)

    def _stream(self, request: type[Message]) -> Callable[[Any, Context], Awaitable[None]]:
        async def handle(_: AsyncIterator[bytes], context: Context) -> None:
            begin_request()
            await _answer(context, self._session(context, request))

        return handle

    async def _session(self, context: Context, request: type[Message]) -> None:
        with traces.span("session", context.invocation_metadata() or ()) as span:
            stream = MessageStream[Any, Any](
                context, request, tenant=tenant_of(context), link=self._service.link, span=span
            )
            await self._service.session(stream)

    def _description(self, request: type[Message]) -> Callable[[bytes, Context], Awaitable[bytes]]:
        async def handle(data: bytes, context: Context) -> bytes:
            try:
                request.FromString(data)
            except DecodeError:
                await abort(context, InvalidRequest(f"the message is not a {request.DESCRIPTOR.name}"))
            description = await _answer(context, self._service.describe())
            return description.SerializeToString()

        return handle


async def serve(
    service: Service,
    listen: str,
    *,
    grace: float,
    role: str | None = None,
    tls: Path | None = None,
    insecure: bool = False,
    metrics: str | None = None,
) -> Never:
    """Serves until SIGTERM or SIGINT, then drains for `grace` seconds; a second signal stops at once.

    Either way the process ends then, with exit code 0, even where the engine is in the middle of a long turn.
    Prints one line on stdout when it serves: `trifold ROLE ready on HOST:PORT …`; its tier is the role of a
    service that has no other. `tls` and `insecure` as for TierServer.start(); `metrics` is the HOST:PORT
    where those are shown, if anywhere. Raises ConfigError.
    """
    server = TierServer(service)
    signals: asyncio.Queue[None] = asyncio.Queue()
    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, None)
    await server.start(listen, tls=tls, insecure=insecure)
    # What is loaded now stays: a collection of garbage that looked through all of it would hold up a token.
    gc.collect()
    gc.freeze()
    role = role or service.info.tier
    with metrics_shown(metrics, service.counted, server.readings):
        async with watched():
            print(f"trifold {role} ready on {server.address} with bundle {service.digest[:12]}", flush=True)
            await signals.get()
            await until_first(server.drain(grace), signals.get())
            await server.stop()
    traces.flush()
    # Not by way of the interpreter's end: a thread that is in an engine's code then would abort the process.
    os._exit(0)


async def _answer(context: Context, work: Awaitable[T]) -> T:
    """The one border: whatever a call raises becomes a status, and harms nobody else."""
    try:
        return await work
    except Exception as error:
        # Without its frames: gRPC keeps the end of a call for a while, and they a session's cache and shard.
        problem = public(error).with_traceback(None)
    return await abort(context, problem)
