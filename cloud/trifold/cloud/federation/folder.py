"""The folder of a run: settings, checkpoints, log, and the adapter so far."""

from __future__ import annotations

import fcntl
import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, Self

from trifold.cloud.federation.settings import RunSettings
from trifold.shared import durable
from trifold.shared.errors import ConfigError, DamagedFile, Unavailable

RUN: Final = "run.json"

_TRIES: Final = 20
_PAUSE: Final = 0.05
"""Whoever looks whether a run is at work holds its lock for an instant."""


class RunFolder:
    """`name` is the run's own and random: sites key what they keep of a run by it."""

    def __init__(self, path: Path, name: str, settings: RunSettings) -> None:
        self.path = path
        self.name = name
        self.settings = settings
        self.checkpoints = path / "checkpoints"

    @classmethod
    def create(cls, path: Path, settings: RunSettings) -> Self:
        """Raises ConfigError when there is a run already."""
        if (path / RUN).exists():
            raise ConfigError(f"{path} holds a run already: resume it, or name another folder")
        folder = cls(path.resolve(), secrets.token_hex(8), settings)
        content = {"name": folder.name, "settings": settings.model_dump(mode="json")}
        try:
            durable.write(folder.path / RUN, json.dumps(content, indent=2).encode())
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
        return folder

    @classmethod
    def open(cls, path: Path) -> Self:
        """Raises ConfigError when there is no run, DamagedFile when its settings cannot be read."""
        try:
            content = json.loads((path / RUN).read_bytes())
            return cls(path.resolve(), str(content["name"]), RunSettings.checked(content["settings"]))
        except OSError as error:
            raise ConfigError(f"{path} holds no run: {RUN} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedFile(f"{path / RUN}: is not the settings of a run: {error}") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """For the one process that works on the run; the lock goes with it, however it ends.

        Raises Unavailable while there is another.
        """
        with (self.path / RUN).open("r+b") as file:
            for _ in range(_TRIES):
                if _lock(file, fcntl.LOCK_EX):
                    break
                time.sleep(_PAUSE)
            else:
                raise Unavailable(
                    f"another ServerApp works on it: follow that with `trifold federate status {self.path}`"
                )
            yield

    def at_work(self) -> bool:
        """Whether a process works on the run."""
        with (self.path / RUN).open("rb") as file:
            return not _lock(file, fcntl.LOCK_SH)


def _lock(file: BinaryIO, kind: int) -> bool:
    """Whether the lock is had; until the file is closed, if so."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
