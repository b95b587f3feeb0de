"""A whole site on loopback: cloud, edge and `trifold device serve`, each a process of its own."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from openai import OpenAI

from tests.network.proxy import Proxy
from tests.processes import Processes
from trifold.device import Client
from trifold.shared.cli.service_process import ServiceProcess


@asynccontextmanager
async def over_a_slow_link(tiers: Processes, journals: Path, *options: str) -> AsyncIterator[Service]:
    """A service that gets a token every 0.3 seconds; what blocks must be called in a thread."""
    async with Proxy(tiers.edge, delay=0.15) as proxy:
        service = await asyncio.to_thread(Service, tiers, journals, "--edge", proxy.address, *options)
        try:
            yield service
        finally:
            await asyncio.to_thread(service.__exit__, None, None, None)


class Service:
    """`trifold device serve` in front of tiers that run; it may be killed and started again.

    `url` is that of OpenAI's API.
    """

    def __init__(
        self, tiers: Processes, journals: Path, *options: str, interpreter: Sequence[str] = (sys.executable,)
    ) -> None:
        """`options` are further arguments, `interpreter` is that of ServiceProcess."""
        self.tiers = tiers
        self._interpreter = interpreter
        self._options = ["--edge", tiers.edge, "--journals", str(journals), *options]
        self.url = ""
        self._process = self._start("127.0.0.1:0", "127.0.0.1:0")

    @property
    def address(self) -> str:
        """Of gRPC."""
        return self._process.address

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        """What it printed on stderr so far."""
        return self._process.log()

    def openai(self, key: str = "none", *, retries: int = 0) -> OpenAI:
        return OpenAI(base_url=self.url, api_key=key, max_retries=retries)

    def sessions(self) -> int:
        with Client(self.tiers.edge, bundle=self.tiers.bundle) as client:
            return client.describe().sessions

    def wait_until_no_session_is_left(self) -> None:
        """At most 20 seconds, in which an answer over a slow link would not end by itself."""
        until = time.monotonic() + 20
        while self.sessions():
            assert time.monotonic() < until, "a session that was given up is still open"
            time.sleep(0.1)

    def restart(self) -> None:
        """As after a crash, where it was."""
        address, http = self.address, self.url.split("/")[2]
        with self._process:
            self._process.kill()
        self._process = self._start(address, http)

    def terminate(self) -> int:
        return self._process.terminate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.__exit__(kind, error, trace)

    def _start(self, listen: str, http: str) -> ServiceProcess:
        command = ["device", "serve", str(self.tiers.bundle), *self._options]
        process = ServiceProcess(
            [*command, "--listen", listen, "--http", http], interpreter=self._interpreter
        )
        match = re.search(r"https?://\S+/v1", process.log())
        assert match
        self.url = match[0]
        return process
