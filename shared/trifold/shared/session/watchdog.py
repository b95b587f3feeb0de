"""What systemd hears of a service: that it is ready, and then, again and again, that its event loop turns."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, Never

_MICROSECONDS: Final = 1e6

_PULSES: Final = 3
"""In the time after which systemd takes the service for hung; one of them may be late."""


@asynccontextmanager
async def watched() -> AsyncIterator[None]:
    """Within it the service serves. Where systemd did not start this process, it does nothing.

    The protocol is that of sd_notify(3) and sd_watchdog_enabled(3): a unit has `Type=notify` and, to be
    started anew when it hangs, `WatchdogSec=`. Children of this process do not inherit it.
    """
    address = os.environ.pop("NOTIFY_SOCKET", "")
    wanted = float(os.environ.pop("WATCHDOG_USEC", 0)) / _MICROSECONDS
    if os.environ.pop("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        wanted = 0.0
    if not address:
        yield
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as systemd:
        systemd.setblocking(False)
        # An @ stands for the zero byte of an address that is no file.
        systemd.connect("\0" + address[1:] if address.startswith("@") else address)
        systemd.send(b"READY=1")
        pulse = asyncio.create_task(_pulse(systemd, wanted / _PULSES)) if wanted else None
        try:
            yield
        finally:
            if pulse:
                pulse.cancel()


async def _pulse(systemd: socket.socket, pause: float) -> Never:
    while True:
        # A full queue or a systemd that starts anew loses a pulse and not the service.
        with contextlib.suppress(OSError):
            systemd.send(b"WATCHDOG=1")
        await asyncio.sleep(pause)
