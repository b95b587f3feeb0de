from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

CODE = """
import sys, time
from trifold.edge.federation.executor import ClientAppExecutor
ClientAppExecutor(sys.argv[1]).start()
time.sleep(60)
"""


@contextmanager
def node(fails: Callable[[int], bool]) -> Iterator[tuple[subprocess.Popen[str], threading.Event]]:
    """An executor in a process, and a node that has no task for it, nor an answer to some of its questions.

    The event is that of the fiftieth question.
    """
    asked, often = 0, threading.Event()

    class Runtime(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal asked
            asked += 1
            self.send_response(500 if fails(asked) else 200)
            self.send_header("content-length", "0")
            self.end_headers()
            if asked == 50:
                often.set()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Runtime) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        command = [sys.executable, "-c", CODE, f"127.0.0.1:{server.server_port}"]
        quiet = os.environ | {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        try:
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=quiet) as process:
                yield process, often
                process.kill()
        finally:
            server.shutdown()
            serving.join()


def test_an_executor_outlives_failures_that_pass() -> None:
    with node(lambda asked: asked % 4 == 0) as (process, often):
        assert often.wait(60)
        assert process.poll() is None


def test_an_executor_that_fails_time_and_again_ends_the_node_and_says_so() -> None:
    with node(lambda asked: asked > 3) as (process, _):
        _, said = process.communicate(timeout=30)
    assert process.returncode == 69
    assert "a task of this node could not be taken" in said
    assert "10 failures without a break: this node ends" in said
