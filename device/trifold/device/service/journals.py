"""The journals of generations that clients may take up again by the id of their request."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Final

from trifold.device.service.keys import Caller
from trifold.shared.errors import ConfigError, InvalidRequest, UnknownSession

_KEPT: Final = 3600.0
"""Seconds after its last token that a generation is kept, …"""

_SWEPT: Final = 60.0
"""… and between looks for those that are older."""


class Journals:
    """One file a generation, named by its caller, its id and what is asked for, by hash."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError when the folder cannot be made."""
        self._folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the folder {folder} cannot be made: {error.strerror}") from None
        self._made = {path.name.partition("-")[0]: path for path in folder.glob("*-*.journal")}
        self._next_sweep = 0.0

    def path(self, caller: Caller, request_id: str, asked: bytes | None) -> Path:
        """The journal of a request: it exists when the request has been made before.

        `asked` is what it asks for, None where it says nothing but its id.
        Raises InvalidRequest when that id was used to ask for something else, UnknownSession when a
        generation is asked for by an id that was not used.
        """
        self._sweep()
        name = _hash(f"{caller.name}\0{request_id}".encode())
        made = self._made.get(name)
        if made and not made.exists():  # what was asked for has been refused
            made = None
        if asked is None:
            if made is None:
                raise UnknownSession(f"there is no generation {request_id}, or no longer: ask for it anew")
            return made
        path = self._folder / f"{name}-{_hash(asked)}.journal"
        if made not in (None, path):
            raise InvalidRequest(f"{request_id} is the id of another request: choose a new one")
        self._made[name] = path
        return path

    def _sweep(self) -> None:
        now = time.time()
        if now < self._next_sweep:
            return
        self._next_sweep = now + _SWEPT
        for name, path in list(self._made.items()):
            if not path.exists():
                del self._made[name]
            elif path.stat().st_mtime < now - _KEPT:
                path.unlink()
                del self._made[name]


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
