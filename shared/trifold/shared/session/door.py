"""Where a server is reached: with TLS as a node, and whoever comes is checked; or without, on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Never

import grpc.aio
from prometheus_client.core import Metric

from trifold.shared.identity.access import check_serving
from trifold.shared.identity.gate import Gate
from trifold.shared.identity.keeper import Keeper
from trifold.shared.session.channel import SERVER_OPTIONS, way
from trifold.shared.session.decoding import Decoding
from trifold.shared.session.ports import check_free
from trifold.shared.telemetry.metrics import CERTIFICATE_EXPIRY

_SERVERS: Final = 4
"""Of grpc.aio, each of which takes in one call after the other: a busy one would keep new ones waiting."""


class Door:
    """gRPC at HOST:PORT; port 0 takes a free one. Its `servers` share the port: all are to serve the same.

    With `tls`, a node's folder, it speaks mutual TLS as that node, checks every call, keeps its certificate
    young, and ends the streams of callers who were revoked. It lets in the node's own tenants, or every one.
    """

    def __init__(
        self,
        listen: str,
        service: str,
        tls: Path | None = None,
        *,
        insecure: bool = False,
        every_tenant: bool = False,
    ) -> None:
        """For `service`, by its full name.

        Raises ConfigError for an address off loopback without TLS, or a folder of no node that serves it.
        """
        self._listen = listen
        self._keeping: asyncio.Task[Never] | None = None
        self.node = way(listen, tls, insecure=insecure)
        gates = []
        if self.node:
            check_serving(self.node.identity, service)
            tenants = None if every_tenant else frozenset(self.node.identity.tenants)
            gates = [Gate(self.node.revoked, tenants)]
            self._keeper = Keeper(self.node, revoked=True, looked=gates[0].sweep)
        self.servers = [
            grpc.aio.server(options=SERVER_OPTIONS, interceptors=[*gates, Decoding()])
            for _ in range(_SERVERS)
        ]

    async def open(self) -> str:
        """Serves from now on; the HOST:PORT that it has got. Raises ConfigError where that is impossible."""
        # gRPC would share the port with another service, too.
        check_free(self._listen)
        address = self._listen
        for server in self.servers:
            if self.node:
                port = server.add_secure_port(address, self.node.server_credentials())
            else:
                port = server.add_insecure_port(address)
            address = f"{self._listen.rpartition(':')[0]}:{port}"
        await asyncio.gather(*(server.start() for server in self.servers))
        if self.node:
            self._keeping = asyncio.create_task(self._keeper.run())
        return address

    def readings(self) -> Iterator[Metric]:
        """Until when its certificate holds, if it has one."""
        if self.node:
            yield CERTIFICATE_EXPIRY.of(self.node.papers.certificate.not_valid_after_utc.timestamp())

    async def close(self, grace: float) -> None:
        if self._keeping:
            self._keeping.cancel()
        await asyncio.gather(*(server.stop(grace) for server in self.servers))
