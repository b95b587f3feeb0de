"""A site's node: Flower's SuperNode, without its pauses and with ClientApps that start at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def run(arguments: Sequence[str], port: int) -> None:
    """Run `flower-supernode ARGUMENTS` in this process until it is stopped; its own API is at `port`."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

    # After the environment: Flower reads it when it is imported.
    from flwr.supernode.cli import flower_supernode

    from trifold.edge.federation.executor import ClientAppExecutor
    from trifold.edge.federation.pace import shorten

    shorten()
    ClientAppExecutor(f"127.0.0.1:{port}").start()
    own = ["--isolation", "process", "--host", "127.0.0.1", "--port", str(port)]
    sys.argv = ["flower-supernode", *own, *arguments]
    flower_supernode()
