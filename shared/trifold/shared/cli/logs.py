"""What is shown of the log, on stderr: by a command like its other messages, by a service with the time."""

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


def log_service(level: str) -> None:
    """Shows what a service and its libraries log at `level` or above, each line with its time."""
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(message)s")
