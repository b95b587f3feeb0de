"""The training process of the cloud on loopback, which tests may kill and start again where it was."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from trifold.shared.cli.service_process import ServiceProcess


class TrainingProcess:
    """`trifold cloud train` of a bundle, with one thread, as a context. `options` are further arguments."""

    def __init__(self, bundle: Path, *options: str) -> None:
        self.address = "127.0.0.1:0"
        self._bundle = bundle
        self._options = options
        self._process: ServiceProcess | None = None

    @property
    def log(self) -> str:
        """What it printed on stderr so far."""
        return self._running.log()

    def start(self, *options: str) -> None:
        """Starts it where it was before, and returns when it is ready."""
        command = ["cloud", "train", str(self._bundle), "--listen", self.address, "--threads", "1"]
        self._process = ServiceProcess([*command, *self._options, *options])
        self.address = self._process.address

    def kill(self) -> None:
        """Ends it as a crash would."""
        with self._running as process:
            process.kill()
        self._process = None

    def stop(self) -> int:
        """Ends it with SIGTERM; its exit code."""
        with self._running as process:
            code = process.terminate()
        self._process = None
        return code

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process:
            self._process.__exit__(kind, error, trace)

    @property
    def _running(self) -> ServiceProcess:
        assert self._process is not None
        return self._process
