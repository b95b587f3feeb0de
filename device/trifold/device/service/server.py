"""The servers of a site's service, gRPC and HTTP, on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import uvicorn
from fastapi import FastAPI
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from grpc_health.v1.health import aio as health
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection
from prometheus_client.core import Metric

from trifold.device.service.generate import GenerateService
from trifold.proto.v1 import generate_pb2 as pb
from trifold.proto.v1.generate_pb2_grpc import add_GenerateServiceServicer_to_server
from trifold.shared.identity.node import CHAIN, KEY, Node
from trifold.shared.session.channel import way
from trifold.shared.session.door import Door
from trifold.shared.session.ports import listening
from trifold.shared.session.stream import until_first

_NAME: Final = pb.DESCRIPTOR.services_by_name["GenerateService"].full_name

_LOOK: Final = 30.0
"""Seconds between looks at the node's certificate, which is renewed long before it runs out."""


class SiteServer:
    """Both servers, from start() to stop(); `address` and `url` say where they listen."""

    def __init__(
        self,
        service: GenerateService,
        app: FastAPI,
        *,
        listen: str,
        http: str,
        tls: Path | None = None,
        insecure: bool = False,
    ) -> None:
        """With TLS as the node of the folder `tls`: mutual for gRPC, of the server alone for HTTP.

        Raises ConfigError for an address off loopback without TLS, unless that is `insecure`.
        """
        self.address = ""
        self.url = ""
        self._door = Door(listen, _NAME, tls, insecure=insecure)
        self._health = health.HealthServicer()
        for server in self._door.servers:
            add_GenerateServiceServicer_to_server(service, server)
            add_HealthServicer_to_server(self._health, server)
            reflection.enable_server_reflection((_NAME, HEALTH, reflection.SERVICE_NAME), server)
        self._at = http
        self._tls = tls
        self._node = way(http, tls, insecure=insecure)
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")
        config.load()
        self._http = _Http(config)
        self._serving: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Raises ConfigError where that is impossible."""
        self.address = await self._door.open()
        if self._node and self._tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            _show(context, self._tls)
            self._http.config.ssl = context
            self._serving.append(asyncio.create_task(_keep(context, self._node, self._tls)))
        at = listening(self._at)
        scheme = "https" if self._http.config.ssl else "http"
        self.url = f"{scheme}://{self._at.rpartition(':')[0]}:{at.getsockname()[1]}"
        self._serving.append(asyncio.create_task(self._http.serve([at])))
        await self._announce(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace: float) -> None:
        """Takes no more calls, and gives those that run `grace` seconds to end."""
        await self._announce(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._http.config.timeout_graceful_shutdown = max(1, round(grace))
        self._http.should_exit = True
        await self._door.close(grace)
        *keeping, serving = self._serving
        for task in keeping:
            task.cancel()
        await serving

    def readings(self) -> Iterator[Metric]:
        """Until when its certificate holds, if it has one."""
        return self._door.readings()

    async def _announce(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", _NAME):
            await self._health.set(name, status)


async def until_signal(server: SiteServer, grace: float) -> None:
    """Serves until SIGTERM or SIGINT, then drains for `grace` seconds; a second signal ends that."""
    signals: asyncio.Queue[None] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, None)
    await signals.get()
    await until_first(server.stop(grace), signals.get())


class _Http(uvicorn.Server):
    """uvicorn without its signal handlers: the process has two servers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _keep(context: ssl.SSLContext, node: Node, folder: Path) -> None:
    """Shows new connections the certificate that the node has by then."""
    shown = node.papers.chain
    while True:
        await asyncio.sleep(_LOOK)
        if node.papers.chain != shown:
            _show(context, folder)
            shown = node.papers.chain


def _show(context: ssl.SSLContext, folder: Path) -> None:
    context.load_cert_chain(folder / CHAIN, folder / KEY)
