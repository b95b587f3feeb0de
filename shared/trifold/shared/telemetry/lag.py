"""How late the event loop is: whatever keeps it busy for long holds up every session of the process."""

from __future__ import annotations

import asyncio
from typing import Final, Never

from trifold.shared.telemetry.metrics import LOOP_LAG

_PAUSE: Final = 0.25


async def watch_loop() -> Never:
    """Looks a few times a second, for ever."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _PAUSE
        await asyncio.sleep(_PAUSE)
        LOOP_LAG.observe(max(0.0, loop.time() - due))
