"""Federation: SuperLink, training process and sites on loopback, each a process, with their logs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from trifold.shared.cli.service_process import ServiceProcess
from trifold.shared.errors import TrifoldError

_BIN: Final = Path(sys.executable).parent
_TRIFOLD: Final = (sys.executable, "-m", "trifold.shared.cli.main")

_QUIET: Final = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    # How often Flower's executor looks for a run to start; 3 s unless told.
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
}


class Federation:
    """The processes of one federation, as a context. What they keep and print lies in `folder`.

    `sites` are folders of text by the names of sites; `app` is the Flower app of Trifold. `way` says by which
    address a site reaches the cloud's (HOST:PORT), where something stands between them. `processes` are ids
    by name: `superlink`, `superexec`, `training`, and `SITE-trainer` and `SITE-node` of each site.
    """

    def __init__(
        self,
        folder: Path,
        bundle: Path,
        sites: Mapping[str, Path],
        app: Path,
        way: Callable[[str], str] = str,
    ) -> None:
        self.folder = folder
        self.superlink = f"127.0.0.1:{_free_port()}"
        self.training = f"127.0.0.1:{_free_port()}"
        self.processes: dict[str, int] = {}
        self._app = app.absolute()
        self._stack = ExitStack()
        paths = {"PATH": f"{_BIN}:{os.environ['PATH']}", "FLWR_HOME": str(folder / "flower")}
        self._environment = os.environ | paths | _QUIET
        self._services = {"training": ["cloud", "train", str(bundle), "--listen", self.training]}
        self._others = self._flower()
        for site, text in sites.items():
            state = folder / site
            told = ["--site", site, "--text", str(text), "--state", str(state)]
            told += ["--cloud", way(self.training)]
            self._services[f"{site}-trainer"] = ["edge", "train", str(bundle), *told]
            node = [way(self.superlink), "--insecure", "--trainer", str(state / "trainer.sock")]
            node += ["--port", str(_free_port())]
            self._others[f"{site}-node"] = [*_TRIFOLD, "edge", "join", *node]

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for name in (*self._services, *self._others):
                self.start(name)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def federate(self, *arguments: str, quiet: bool = True) -> str:
        """`trifold federate ARGUMENTS`, to its end; returns what it printed where that is `quiet`.

        Raises TrifoldError with what it printed.
        """
        command = [*_TRIFOLD, "federate", *arguments]
        command += ["--superlink", self.superlink, "--app", str(self._app)]
        done = subprocess.run(
            command, capture_output=quiet, text=True, cwd=self.folder, env=self._environment, check=False
        )
        if done.returncode:
            said = f"{done.stdout or ''}{done.stderr or ''}"[-2000:]
            raise TrifoldError(f"`trifold federate {arguments[0]}` failed; logs are in {self.folder}\n{said}")
        return done.stdout or ""

    def start(self, name: str) -> None:
        """One of the processes, for the first time or after a `kill`."""
        if told := self._services.get(name):
            service = self._stack.enter_context(ServiceProcess([*told, "--threads", "1"]))
            self.processes[name] = service.pid
        else:
            self.processes[name] = self._launch(name, self._others[name])

    def kill(self, name: str) -> None:
        """Ends it at once (SIGKILL), as a crash would, and what it has started lives on."""
        os.kill(self.processes[name], signal.SIGKILL)
        # Its ports are free when this returns; who has started it still learns how it ended.
        os.waitid(os.P_PID, self.processes[name], os.WEXITED | os.WNOWAIT)

    def _flower(self) -> dict[str, list[str]]:
        """Flower's server, and what starts its ServerApps."""
        host, port = self.superlink.split(":")
        link = ["--insecure", "--host", host, "--port", port, "--isolation", "process"]
        link += ["--database", str(self.folder / "flower.sqlite")]
        link += ["--disable-runtime-dependency-installation"]
        executor = ["--insecure", "--runtime-api-address", self.superlink]
        return {
            "superlink": [str(_BIN / "flower-superlink"), *link],
            "superexec": [str(_BIN / "flower-superexec"), *executor],
        }

    def _launch(self, name: str, command: list[str]) -> int:
        """A process without a line that says it is ready: who needs it waits for it. Returns its id."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=self._environment,
                start_new_session=True,
            )
        self._stack.callback(_stop, process)
        return process.pid


def _stop(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started: it leads a session of its own."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
