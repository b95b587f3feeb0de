"""Starts a ClientApp for each message that a SuperNode has taken, from a process that has Flower loaded.

Flower's own SuperExec starts a new Python each time, which imports Flower for one to two seconds of a
processor. A fork server has imported it once; its children do with milliseconds.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from multiprocessing.process import BaseProcess
from typing import Any, Final

from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import run_clientapp

from trifold.edge.federation.pace import shorten
from trifold.shared.errors import Unavailable

_LOADED: Final = [
    "flwr.supernode.runtime.run_clientapp",
    "trifold.edge.federation.client_app",
    "trifold.edge.federation.executor",
    "trifold.shared.cli.main",
]

_PAUSE: Final = 0.2
"""Seconds between asking for tasks."""

_AGAIN: Final = 0.2
"""Seconds after a failure."""

_FAILURES: Final = 10
"""One after the other, until the process is given up."""

log = logging.getLogger(__name__)


class ClientAppExecutor:
    """Takes tasks from the Runtime API of the SuperNode at `address` (HOST:PORT on loopback, no TLS).

    A SuperNode whose tasks nobody runs would take messages and never answer. So where tasks cannot be taken
    or started, time and again, the process ends with an exit code: whoever watches it can start it anew.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_LOADED)
        self._running: list[BaseProcess] = []
        self._client = RuntimeHttpClient.from_server_address(
            server_address=address,
            insecure=True,
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec")],
            retry_invoker=make_simple_http_retry_invoker(),
        )

    def start(self) -> None:
        """From now on until the process ends."""
        threading.Thread(target=self._run, name="clientapp-executor", daemon=True).start()

    def _run(self) -> None:
        failures = 0
        while failures < _FAILURES:
            try:
                self._take()
            except Exception:
                log.exception("a task of this node could not be taken or started")
                failures += 1
                time.sleep(_AGAIN)
            else:
                failures = 0
                time.sleep(_PAUSE)
        log.critical("%d failures without a break: this node ends", failures)
        os._exit(Unavailable.exit_code)

    def _take(self) -> None:
        """Start the task that waits, if there is one."""
        taken = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        if taken.HasField("task") and taken.token:
            self._launch(taken.token)
        self._running = [process for process in self._running if process.is_alive()]

    def _launch(self, token: str) -> None:
        process = self._context.Process(
            target=_run,
            kwargs={
                "runtime_api_address": self._address,
                "token": token,
                "insecure": True,
                "parent_pid": os.getpid(),
            },
        )
        process.start()
        self._running.append(process)


def _run(**arguments: Any) -> None:
    """One ClientApp, in a process of its own."""
    shorten()
    run_clientapp(**arguments)
