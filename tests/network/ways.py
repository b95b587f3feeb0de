"""Ways: proxies for programs without an event loop, one for each address that is asked for."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType
from typing import Any, Self

from tests.network.proxy import Proxy


class Ways:
    """A context. `options` are those of each Proxy; `recorded` is all that passed, in both directions."""

    def __init__(self, **options: Any) -> None:
        self.proxies: list[Proxy] = []
        self.recorded: list[bytes] = []
        self._options = options
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __call__(self, address: str) -> str:
        """The address by which `address` is reached."""
        proxy = Proxy(address, record=self.recorded.append, **self._options)
        asyncio.run_coroutine_threadsafe(proxy.__aenter__(), self._loop).result()
        self.proxies.append(proxy)
        return proxy.address

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for proxy in self.proxies:
            asyncio.run_coroutine_threadsafe(proxy.__aexit__(None, None, None), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
