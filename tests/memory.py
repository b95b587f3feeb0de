"""The memory of a process."""

from __future__ import annotations

import re
from pathlib import Path


def anonymous(pid: int) -> int:
    """Bytes that are its own and no file's: what it has allocated and touched."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Anonymous: +(\d+) kB", rollup, re.MULTILINE)
    assert found, rollup
    return int(found[1]) * 1024
