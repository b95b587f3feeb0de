from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from flwr.proto.fleet_pb2 import ActivateNodeResponse


class FailingSuperLink(BaseHTTPRequestHandler):
    """Knows the node, and fails at everything that it asks then."""

    def do_POST(self) -> None:
        known = self.path.endswith(("register-node", "activate-node"))
        answer = ActivateNodeResponse(node_id=7).SerializeToString() if "activate" in self.path else b""
        self.send_response(200 if known else 500)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


def test_a_node_whose_superlink_fails_ends_and_says_so(unused_tcp_port: int) -> None:
    with HTTPServer(("127.0.0.1", 0), FailingSuperLink) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        command = [sys.executable, "-m", "trifold.shared.cli.main", "edge", "join"]
        command += [f"127.0.0.1:{server.server_port}", "--insecure", "--trainer", "none.sock"]
        command += ["--port", str(unused_tcp_port)]
        quiet = os.environ | {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=quiet)
        finally:
            server.shutdown()
            serving.join()
    assert done.returncode != 0
    assert "The SuperLink has failed: start this node again" in done.stdout + done.stderr
