"""What a command shows of Trifold's log: lines on stderr, like its other messages."""

from __future__ import annotations

import logging


def show_log(level: str) -> None:
    """Shows what Trifold logs at `level` or above; other packages' logs stay as they are."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("trifold: %(message)s"))
    logger = logging.getLogger("trifold")
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False
