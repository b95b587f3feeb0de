"""A process's metrics over HTTP, in the text format of Prometheus: at /metrics, and nothing else."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from typing import Final
from urllib.parse import urlsplit

from prometheus_client import (
    CollectorRegistry,
    MetricsHandler,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from trifold.shared.errors import ConfigError
from trifold.shared.telemetry.lag import watch_loop

_PATH: Final = "/metrics"

_PATIENCE: Final = 10.0
"""Seconds that a scraper gets to say what it wants, and to take it."""


class Exposition:
    """Shows metrics at HOST:PORT to whoever asks, from threads of its own, until close()."""

    def __init__(
        self, listen: str, counted: Iterable[Collector], readings: Callable[[], Iterable[Metric]] = list
    ) -> None:
        """What was `counted`, the `readings` of that moment, and the process's memory and processor time.

        Port 0 takes a free one. Raises ConfigError where it cannot listen there.
        """
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = CollectorRegistry()
        for collector in (*counted, _Readings(readings)):
            registry.register(collector)
        ProcessCollector(registry=registry)
        host, _, port = listen.rpartition(":")
        try:
            self._server = _Server((host.strip("[]"), int(port)), _Handler.factory(registry))
        except OSError as error:
            raise ConfigError(f"cannot show metrics at {listen}: {error.strerror}") from None
        self.url = f"http://{host}:{self._server.server_port}{_PATH}"
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def metrics_shown(
    listen: str | None, counted: Iterable[Collector], readings: Callable[[], Iterable[Metric]]
) -> Iterator[None]:
    """As an Exposition, which is told of on stderr, and with a watch on the event loop; nothing for None."""
    if listen is None:
        yield
        return
    shown = Exposition(listen, counted, readings)
    watching = asyncio.create_task(watch_loop())
    try:
        print(f"metrics are at {shown.url}", file=sys.stderr, flush=True)
        yield
    finally:
        watching.cancel()
        shown.close()


class _Readings(Collector):
    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        yield from self._read()

    def describe(self) -> Iterable[Metric]:
        """Not by asking everything while it may still be made."""
        return ()


class _Handler(MetricsHandler):
    timeout = _PATIENCE

    def do_GET(self) -> None:  # noqa: N802 - named by the standard library
        if urlsplit(self.path).path == _PATH:
            super().do_GET()
        else:
            self.send_error(HTTPStatus.NOT_FOUND, f"there is {_PATH} only")


class _Server(ThreadingHTTPServer):
    def __init__(self, address: tuple[str, int], handler: type[MetricsHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Without asking the name service who this machine is, which may take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = str(self.server_address[0]), self.socket.getsockname()[1]
