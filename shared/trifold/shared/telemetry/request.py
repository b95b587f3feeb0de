"""The number of a request: whatever is logged for it, in this process, has it."""

from __future__ import annotations

from itertools import count
from typing import Final

import structlog

_NUMBERS: Final = count(1)


def begin_request() -> None:
    """To be called first in the task that handles it. The ids of sessions are secrets; this is none."""
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(request=next(_NUMBERS))
