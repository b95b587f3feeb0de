"""The memory of a process."""

from __future__ import annotations

from pathlib import Path


def anonymous(pid: int) -> int:
    """Bytes in memory that are of no file: what it has allocated and touched. 0 for one that has ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
