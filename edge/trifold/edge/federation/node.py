"""A site's node: Flower's SuperNode, without its pauses and with ClientApps that start at once."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Final

_PACE: Final = 0.25
"""Seconds between looking for messages at the SuperLink and for what a ClientApp has done.

Flower 1.41 looks every 3 s for the one and every 0.5 s for the other, and has no setting for it.
"""

_NEAR: Final = 0.05
"""Seconds between looking for tasks at this node's own SuperNode."""


def run(arguments: Sequence[str], port: int) -> None:
    """Run `flower-supernode ARGUMENTS` in this process until it is stopped; its own API is at `port`."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

    # After the environment: Flower reads it when it is imported.
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli import flower_supernode

    from trifold.edge.federation.executor import ClientAppExecutor

    # The module's loop is all that uses its `time`, and for these pauses alone.
    vars(start_client_internal)["time"] = SimpleNamespace(sleep=_shortly)
    ClientAppExecutor(f"127.0.0.1:{port}", pace=_NEAR).start()
    own = ["--isolation", "process", "--host", "127.0.0.1", "--port", str(port)]
    sys.argv = ["flower-supernode", *own, *arguments]
    flower_supernode()


def _shortly(seconds: float) -> None:
    time.sleep(min(seconds, _PACE))
