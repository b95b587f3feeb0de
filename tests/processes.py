"""Cloud and edge as processes on loopback, that tests may kill and start again where they were."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from trifold.shared.cli.service_process import ServiceProcess

Service = Literal["cloud", "edge"]

_PATIENCE: Final = 300.0
"""Seconds: a processor may be emulated, and a machine busy."""


class Processes:
    """`trifold cloud serve` and `trifold edge serve` of one bundle, as a context; devices connect to `edge`.

    `options` are further arguments of both; `tls` are the folders of their nodes, where they speak TLS;
    `interpreters` are commands that run Python, where that is not this process's own.
    """

    def __init__(
        self,
        bundle: Path,
        *options: str,
        tls: Mapping[Service, Path] | None = None,
        interpreters: Mapping[Service, Sequence[str]] | None = None,
    ) -> None:
        self.bundle = bundle
        self._tls = tls or {}
        self._interpreters = interpreters or {}
        self._options = options
        self._addresses: dict[Service, str] = {"cloud": "127.0.0.1:0", "edge": "127.0.0.1:0"}
        self._processes: dict[Service, ServiceProcess] = {}

    @property
    def edge(self) -> str:
        return self._addresses["edge"]

    @property
    def core(self) -> str:
        return self._addresses["cloud"]

    def pid(self, service: Service) -> int:
        return self._processes[service].pid

    def address(self, service: Service) -> str:
        return self._addresses[service]

    def log(self, service: Service) -> str:
        """What it printed on stderr so far."""
        return self._processes[service].log()

    def start(self, service: Service) -> None:
        """Starts it where it was before, and returns when it is ready."""
        command = [service, "serve", str(self.bundle), "--listen", self._addresses[service], *self._options]
        if service in self._tls:
            command += ["--tls", str(self._tls[service])]
        if service == "edge":
            command += ["--core", self.core]
        interpreter = self._interpreters.get(service, [sys.executable])
        self._processes[service] = ServiceProcess(command, interpreter=interpreter, timeout=_PATIENCE)
        self._addresses[service] = self._processes[service].address

    def kill(self, service: Service) -> None:
        """Ends it as a crash would."""
        with self._processes.pop(service) as process:
            process.kill()

    def stop(self, service: Service) -> int:
        """Ends it with SIGTERM; its exit code."""
        with self._processes.pop(service) as process:
            return process.terminate()

    def __enter__(self) -> Self:
        try:
            self.start("cloud")
            self.start("edge")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        with ExitStack() as stack:
            for process in self._processes.values():
                stack.enter_context(process)
