"""Patient: the machine that is examined, and what is known of its part in a deployment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

MIB: Final = 1 << 20


@dataclass(frozen=True)
class Patient:
    """None stands for what was not given: its checks are skipped.

    `config` is the TOML file of settings, `kv_memory` are the bytes that an edge may fill with caches, `root`
    is where the machine's files begin.
    """

    config: Path | None = None
    bundle: Path | None = None
    core: str | None = None
    tls: Path | None = None
    insecure: bool = False
    threads: int = 0
    timeout: float = 30.0
    kv_memory: int = 0
    root: Path = Path("/")

    def text(self, name: str) -> str:
        """A file of the machine, by its path from the root without the first slash; empty where it is not."""
        try:
            return (self.root / name).read_text(encoding="utf-8", errors="replace").strip("\0\n ")
        except OSError:
            return ""
