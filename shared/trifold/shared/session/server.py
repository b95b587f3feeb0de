"""A tier's gRPC server: brought up on loopback, drained on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import signal
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Final, TypeVar

import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from grpc_health.v1.health import aio as health
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection

from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import ConfigError, InvalidRequest, Unavailable
from trifold.shared.session.channel import SERVER_OPTIONS
from trifold.shared.session.service import TierService
from trifold.shared.session.status import abort, public
from trifold.shared.session.stream import Stream, until_first

_FAREWELL: Final = 0.5
"""Seconds that the last statuses get to leave."""

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

log = logging.getLogger(__name__)

T = TypeVar("T")

Context = grpc.aio.ServicerContext[bytes, bytes]


class TierServer:
    """Serves one tier at `address` from start() to stop()."""

    def __init__(self, service: TierService) -> None:
        self.address = ""
        self._service = service
        self._health = health.HealthServicer()
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Session": grpc.stream_stream_rpc_method_handler(self._session),
            "Describe": grpc.unary_unary_rpc_method_handler(self._describe),
        }
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service.name, handlers)])
        add_HealthServicer_to_server(self._health, self._server)
        names = (service.name, HEALTH, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self, listen: str) -> None:
        """Listens at HOST:PORT; port 0 takes a free one. Raises ConfigError where that is impossible."""
        host = _loopback(listen)
        try:
            port = self._server.add_insecure_port(listen)
        except RuntimeError:
            raise ConfigError(f"cannot listen at {listen}: is another service there?") from None
        self.address = f"{host}:{port}"
        await self._server.start()
        await self._announce(health_pb2.HealthCheckResponse.SERVING)

    async def drain(self, grace: float) -> None:
        """Admits no more sessions, and gives those that run `grace` seconds to end."""
        await self._announce(health_pb2.HealthCheckResponse.NOT_SERVING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._service.table.drain()

    async def stop(self) -> None:
        """Ends what still runs with UNAVAILABLE, so that it is resumed elsewhere or later."""
        self._service.table.evict_all(Unavailable("the service is shutting down: resume the session"))
        await self._server.stop(_FAREWELL)
        await self._service.close()

    async def _announce(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", self._service.name):
            await self._health.set(name, status)

    async def _session(self, _: AsyncIterator[bytes], context: Context) -> None:
        # Ahead of everything that may be cut short, so that an error's status never sends them again.
        await context.send_initial_metadata(())
        await _answer(context, self._service.session(Stream(context)))

    async def _describe(self, request: bytes, context: Context) -> bytes:
        try:
            pb.DescribeRequest.FromString(request)
        except DecodeError:
            await abort(context, InvalidRequest("the message is not a DescribeRequest"))
        description = await _answer(context, self._service.describe())
        return description.SerializeToString()


async def serve(service: TierService, listen: str, *, grace: float) -> None:
    """Serves until SIGTERM or SIGINT, then drains for `grace` seconds; a second signal stops at once.

    Prints one line on stdout when it serves: `trifold TIER ready on HOST:PORT …`. Raises ConfigError.
    """
    server = TierServer(service)
    signals: asyncio.Queue[None] = asyncio.Queue()
    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, None)
    await server.start(listen)
    # What is loaded now stays: a collection of garbage that looked through all of it would hold up a token.
    gc.collect()
    gc.freeze()
    tier, digest = service.info.tier, service.frames.digest[:12]
    print(f"trifold {tier} ready on {server.address} with bundle {digest}", flush=True)
    await signals.get()
    await until_first(server.drain(grace), signals.get())
    await server.stop()


async def _answer(context: Context, work: Awaitable[T]) -> T:
    """The one border: whatever a call raises becomes a status, and harms nobody else."""
    try:
        return await work
    except Exception as error:
        problem = public(error)
    return await abort(context, problem)


def _loopback(listen: str) -> str:
    """The host of HOST:PORT. Raises ConfigError unless nobody outside this machine can reach it."""
    host = listen.rpartition(":")[0]
    try:
        if host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback:
            return host
    except ValueError:
        pass
    raise ConfigError(f"{listen} is not on loopback: without TLS, services listen on 127.0.0.1 or [::1] only")
