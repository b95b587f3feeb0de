"""Between a site's ClientApp and its trainer: records over a Unix socket, as JSON and bytes. No pickle."""

from __future__ import annotations

import json
import time
from multiprocessing.connection import Client, Connection
from typing import Any, Final

from trifold.shared.errors import InvalidRequest, Unavailable

Record = dict[str, Any]
"""Numbers and text by name, and under `data` bytes."""

_LONGEST_HEADER: Final = 2**20
_LONGEST_DATA: Final = 2**31 - 1

_PAUSE: Final = 0.2
"""Seconds between two attempts to reach the trainer."""


def send(connection: Connection, record: Record) -> None:
    header = {name: value for name, value in record.items() if name != "data"}
    connection.send_bytes(json.dumps(header).encode())
    connection.send_bytes(record.get("data", b""))


def receive(connection: Connection) -> Record:
    """Raises EOFError or OSError when the peer is gone, InvalidRequest when it sent something else."""
    try:
        header = json.loads(connection.recv_bytes(_LONGEST_HEADER))
        return dict(header) | {"data": connection.recv_bytes(_LONGEST_DATA)}
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"the peer sent no record: {error}") from None


def ask(socket: str, record: Record, *, patience: float) -> Record:
    """The trainer's answer, however long it works on it.

    A trainer that is lost meanwhile is asked again once it is back: it takes the same steps again. Raises
    Unavailable when there is none for `patience` seconds.
    """
    until = time.monotonic() + patience
    while True:
        try:
            with Client(socket, "AF_UNIX") as connection:
                send(connection, record)
                return receive(connection)
        except (EOFError, OSError) as error:
            if not isinstance(error, FileNotFoundError | ConnectionRefusedError):
                until = time.monotonic() + patience
            if time.monotonic() >= until:
                what = f"the site's trainer at {socket} is not there"
                raise Unavailable(f"{what}: is `trifold edge train` running?") from None
            time.sleep(_PAUSE)
