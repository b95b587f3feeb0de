"""Plans: built engines and timings on disk, each under a key of all that it depends on."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from trifold.cloud.core.engines.tensorrt.graph import REVISION
from trifold.cloud.core.engines.tensorrt.precision import Precision
from trifold.cloud.core.engines.tensorrt.profiles import Limits
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import FLOATS
from trifold.shared.durable import write
from trifold.shared.errors import ConfigError

FOLDER: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trifold" / "tensorrt"


@dataclass(frozen=True)
class Key:
    """What an engine is good for. `library` is TensorRT's version, or "portable" where that may be later.

    `floats` is the hash of the float weights, which the serving digest does not cover.
    """

    gpu: str
    capability: tuple[int, int]
    library: str
    serving_digest: str
    floats: str
    precision: Precision
    limits: Limits
    revision: int = REVISION

    @classmethod
    def of(
        cls,
        folder: TierFolder,
        gpu: str,
        capability: tuple[int, int],
        library: str,
        precision: Precision,
        limits: Limits,
    ) -> Key:
        manifest = folder.manifest
        floats = manifest.training[folder.tier][FLOATS].sha256
        return cls(gpu, capability, library, manifest.serving_digest, floats, precision, limits)

    @property
    def plan(self) -> str:
        """The name of the engine's file: what a person looks for, and a hash of it all."""
        text = json.dumps(asdict(self), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return f"{self._card}-{self.serving_digest[:12]}-{self.precision}-{digest}.plan"

    @property
    def timings(self) -> str:
        """The name of the file of timings, which hold for every network on this card."""
        return f"{self._card}.timings"

    @property
    def _card(self) -> str:
        name = re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-")
        return f"{name}-sm{self.capability[0]}{self.capability[1]}-{self.library}"


class Plans:
    """A folder that nobody but this user writes to: who can change a plan chooses what code runs here."""

    def __init__(self, folder: Path = FOLDER) -> None:
        """Makes the folder. Raises ConfigError where it cannot be, or where others could write to it."""
        self.folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.stat()
        except OSError as error:
            raise ConfigError(f"{folder}: TensorRT's engines cannot be kept: {error.strerror}") from error
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise ConfigError(f"{folder}: others may write here; engines are code: chmod go-w it, and own it")

    def read(self, name: str) -> bytes:
        """Empty for what is not there."""
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise ConfigError(f"{self.folder / name}: cannot be read: {error.strerror}") from error

    def keep(self, name: str, data: bytes) -> None:
        """Whole or not at all. Raises ConfigError where the disk does not take it."""
        try:
            write(self.folder / name, data)
        except OSError as error:
            raise ConfigError(f"{self.folder / name}: cannot be written: {error.strerror}") from error
