"""Between a site's ClientApp and its trainer: records over a Unix socket, as JSON and bytes. No pickle."""

from __future__ import annotations

import json
import logging
import os
import socket as sockets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Connection
from typing import Any, Final

from trifold.shared.errors import DeadlineExceeded, InvalidRequest, Unavailable

Record = dict[str, Any]
"""Numbers and text by name, and under `data` bytes."""

_LONGEST_HEADER: Final = 2**20
_LONGEST_DATA: Final = 2**31 - 1

_PAUSE: Final = 0.2
"""Seconds between two attempts to reach the trainer."""

_LOSSES: Final = 3
"""Trainers that one request may lose: it is the request that ends them, then."""

log = logging.getLogger(__name__)


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


def ask(socket: str, record: Record, *, patience: float, within: float = threading.TIMEOUT_MAX) -> Record:
    """The trainer's answer; it has `within` seconds.

    A trainer that is lost meanwhile is asked again once it is back: it takes the same steps again. One that
    is too slow goes on: it keeps its answer, to be asked for again, and others wait until it is done.

    Raises DeadlineExceeded when the time is over, Unavailable when there is no trainer for `patience` seconds
    or the request has lost several.
    """
    end, until = time.monotonic() + within, time.monotonic() + patience
    losses = 0
    while True:
        try:
            return _answer(socket, record, end)
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() >= min(until, end):
                log.error("there is no trainer at %s", socket)
                what = "the site's trainer is not there: is `trifold edge train` running?"
                raise Unavailable(what) from None
        except (EOFError, OSError):
            if time.monotonic() >= end:
                raise DeadlineExceeded("the site's trainer is not done, and the time is over") from None
            losses, until = losses + 1, time.monotonic() + patience
            if losses == _LOSSES:
                what = f"the site's trainer was lost {losses} times at this request"
                raise Unavailable(f"{what}: its log may say why") from None
        time.sleep(_PAUSE)


def _answer(socket: str, record: Record, end: float) -> Record:
    with Client(socket, "AF_UNIX") as connection, _ending(connection, end - time.monotonic()):
        send(connection, record)
        return receive(connection)


@contextmanager
def _ending(connection: Connection, seconds: float) -> Iterator[None]:
    """Both ways of the connection end after so many seconds: sending waits for a busy trainer, too."""
    with sockets.socket(fileno=os.dup(connection.fileno())) as same:
        timer = threading.Timer(seconds, same.shutdown, [sockets.SHUT_RDWR])
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()
