"""The folder of a run: settings, checkpoints, log, and the adapter so far."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Final, Self

from trifold.cloud.federation.settings import RunSettings
from trifold.shared.errors import ConfigError, DamagedFile
from trifold.shared.federation import durable

RUN: Final = "run.json"


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


def running(process: int) -> bool:
    """Whether a process of this machine is at work; one that has ended and nobody has asked after is not."""
    try:
        os.kill(process, 0)
        # Flower does not ask after what it starts, so that a ServerApp that has ended stays as a zombie.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
    except PermissionError:
        return True
