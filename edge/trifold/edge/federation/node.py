"""A site's node: Flower's SuperNode, without its pauses and with ClientApps that start at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def run(arguments: Sequence[str], port: int) -> None:
    """Run `flower-supernode ARGUMENTS` in this process until it is stopped; its own API is at `port`.

    Ends with an exit code when the SuperLink fails, so that whoever watches the process can start it anew.
    """
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

    # After the environment: Flower reads it when it is imported.
    from flwr.supercore.exit import ExitCode, flwr_exit
    from flwr.supernode.cli import flower_supernode

    from trifold.edge.federation.executor import ClientAppExecutor
    from trifold.edge.federation.pace import shorten

    shorten()
    ClientAppExecutor(f"127.0.0.1:{port}").start()
    own = ["--isolation", "process", "--host", "127.0.0.1", "--port", str(port)]
    sys.argv = ["flower-supernode", *own, *arguments]
    flower_supernode()
    # It comes back when the SuperLink has failed, and its threads would keep a process that answers nobody.
    flwr_exit(ExitCode.SUPERNODE_CONNECTION_ERROR, "The SuperLink has failed: start this node again.")
