"""HostileTrainer: takes the place of a site's trainer and spoils what it answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from multiprocessing.connection import Client, Listener
from pathlib import Path
from types import TracebackType
from typing import Self

from trifold.edge.federation.frames import Record, ask, receive, send

Spoil = Callable[[Record], Record]


class HostileTrainer:
    """A context. The trainer at `socket` goes on behind it; `spoil` changes its answers to rounds."""

    def __init__(self, socket: Path, spoil: Spoil) -> None:
        self.spoil = spoil
        self._socket = socket
        self._trainer = socket.with_name("honest.sock")
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._socket.rename(self._trainer)
        self._listener = Listener(str(self._socket), "AF_UNIX", backlog=64)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with Client(str(self._socket), "AF_UNIX") as connection:
            send(connection, {"action": "leave"})
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            with self._listener.accept() as connection:
                request = receive(connection)
                if request["action"] == "leave":
                    return
                answer = ask(str(self._trainer), request, patience=10.0)
                send(connection, self.spoil(answer) if request["action"] == "train" else answer)
