"""The log of a run: JSON lines, one an event, for tables, curves and whoever else reads along."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

Event = dict[str, Any]

FILE: Final = "metrics.jsonl"


class Log:
    """Appends events to metrics.jsonl of a run's folder; each is on its way to the disk at once.

    Events: begin, asked, answer, refused, lost, round, evaluation, end, failed. A run that was resumed has
    those of a round that was not finished twice: the last `round` of a number is the one that counts.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE

    def write(self, event: str, **details: Any) -> None:
        line = json.dumps({"event": event, "time": round(time.time(), 3)} | details).encode()
        with self._path.open("a+b") as file:
            if _cut(file):
                file.write(b"\n")
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _cut(file: BinaryIO) -> bool:
    """Whether a crash has cut the last line short."""
    if not file.seek(0, os.SEEK_END):
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def read(folder: Path) -> Iterator[Event]:
    """The events so far; a line that a crash has cut short is left out."""
    path = folder / FILE
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                yield event
