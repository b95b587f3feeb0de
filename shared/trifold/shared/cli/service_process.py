"""A service of Trifold as a process of its own: started, waited for, stopped or killed."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from trifold.shared.errors import Unavailable

_READY: Final = re.compile(r"^trifold (?P<tier>\w+) ready on (?P<address>\S+)")


class ServiceProcess:
    """`trifold ARGUMENTS` in a process, from its ready line on.

    `address` is where it listens: with `--listen 127.0.0.1:0` the port is the one it was given.
    `interpreter` is the command that runs Python; another one than this process's own has its own Trifold.
    Raises Unavailable with the last lines it printed when it ends, or is not ready within `timeout` seconds.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        timeout: float = 60.0,
        cwd: Path | None = None,
        interpreter: Sequence[str] = (sys.executable,),
    ) -> None:
        self._arguments = list(arguments)
        self._errors: IO[str] = tempfile.TemporaryFile("w+", prefix="trifold-", suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*interpreter, "-m", "trifold.shared.cli.main", *self._arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=cwd,
        )
        try:
            self.address = self._wait_until_ready(timeout)
        except BaseException:
            self.kill()
            self._errors.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def terminate(self, timeout: float = 30.0) -> int:
        """Asks it to drain (SIGTERM), waits, and returns its exit code; kills it after `timeout` seconds."""
        self._process.terminate()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
        return self._reap()

    def kill(self) -> int:
        """Ends it at once (SIGKILL), as a crash would."""
        self._process.kill()
        return self._reap()

    def log(self) -> str:
        """What it printed on stderr so far."""
        self._errors.seek(0)
        return self._errors.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self.terminate()
        self._reap()
        self._errors.close()

    def _reap(self) -> int:
        code = self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        return code

    def _wait_until_ready(self, timeout: float) -> str:
        assert self._process.stdout is not None
        overdue = threading.Timer(timeout, self._process.kill)
        overdue.start()
        try:
            for line in self._process.stdout:
                if ready := _READY.match(line):
                    return ready["address"]
        finally:
            overdue.cancel()
        code = self._process.wait()
        last = "\n".join(self.log().splitlines()[-10:])
        command = "trifold " + " ".join(self._arguments)
        raise Unavailable(f"`{command}` ended with exit code {code} before it was ready:\n{last}")
