"""The trainer as a process: records in and out over a Unix socket, one at a time."""

from __future__ import annotations

import os
import socket as sockets
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Final

from trifold.edge.federation.frames import Record, receive, send
from trifold.edge.federation.refusal import refusal
from trifold.shared.errors import ConfigError, TrifoldError

_LONGEST_PATH: Final = 107
"""Bytes in the address of a Unix socket on Linux."""


def serve(socket: Path, answer: Callable[[Record], Record]) -> None:
    """Answer records until the process ends. Only the user who runs it can reach the socket.

    Prints one line on stdout when it serves: `trifold trainer ready on SOCKET`. Raises ConfigError when
    the socket is taken or its path is too long.
    """
    if len(os.fsencode(socket)) > _LONGEST_PATH:
        raise ConfigError(f"{socket}: the path of a Unix socket has at most {_LONGEST_PATH} bytes")
    _free(socket)
    mask = os.umask(0o177)
    try:
        listener = Listener(str(socket), "AF_UNIX", backlog=64)
    except OSError as error:
        raise ConfigError(f"{socket} cannot be listened at: {error.strerror}") from None
    finally:
        os.umask(mask)
    print(f"trifold trainer ready on {socket}", flush=True)
    with listener:
        while True:
            with listener.accept() as connection:
                _serve(connection, answer)


def _serve(connection: Connection, answer: Callable[[Record], Record]) -> None:
    """One record. A peer that has left harms nobody: a round is computed to its end all the same, and its
    answer kept, to be asked for again.
    """
    try:
        request = receive(connection)
        try:
            reply = answer(request)
        except Exception as error:
            reply = refusal(error)
        send(connection, reply)
    except (EOFError, OSError, TrifoldError):
        return


def _free(socket: Path) -> None:
    """Removes the socket that a killed trainer has left. Raises ConfigError when something else is there."""
    socket.parent.mkdir(parents=True, exist_ok=True)
    with sockets.socket(sockets.AF_UNIX) as probe:
        try:
            probe.connect(str(socket))
        except FileNotFoundError:
            return
        except OSError:
            if not socket.is_socket():
                raise ConfigError(f"{socket} is no socket: name one that is free") from None
            socket.unlink()
            return
    raise ConfigError(f"{socket}: another trainer listens here")
