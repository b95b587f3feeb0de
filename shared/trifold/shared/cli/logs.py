"""What is shown of the log, on stderr: a command's like its other messages, a service's with all about it."""

from __future__ import annotations

import logging
import sys
from typing import Final

import structlog
from structlog.typing import Processor

from trifold.shared.settings import LogFormat

_ABOUT: Final[list[Processor]] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper("iso", utc=True),
]


def show_log(level: str) -> None:
    """Shows what Trifold logs at `level` or above; other packages' logs stay as they are."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("trifold: %(message)s"))
    logger = logging.getLogger("trifold")
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False


def log_service(level: str, form: LogFormat) -> None:
    """Shows what a service and its libraries log at `level` or above, in lines for people or in JSON.

    Each has its time and the numbers of the request and session that it is about, if any.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_ABOUT,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_rendering(form)],
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler])


def _rendering(form: LogFormat) -> list[Processor]:
    """Tracebacks without the values of variables: these may be what a log must not hold."""
    if form == "json":
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    plain = structlog.dev.plain_traceback
    return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
