"""The client for programs without an event loop: AsyncClient on a loop in the background."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from trifold.device.client import async_client, generation
from trifold.device.client.chat import Message
from trifold.device.client.generation import Chunk
from trifold.proto.v1 import session_pb2 as pb

T = TypeVar("T")


class Client:
    """AsyncClient without `await`: the same arguments, the same errors; several threads may use it."""

    def __init__(
        self,
        edge: str = "127.0.0.1:50061",
        *,
        bundle: Path | str,
        timeout: float = 30.0,
        threads: int = 0,
        inexact: bool = False,
        chunk: int = 512,
    ) -> None:
        """See AsyncClient."""

        async def load() -> async_client.AsyncClient:
            return async_client.AsyncClient(
                edge, bundle=bundle, timeout=timeout, threads=threads, inexact=inexact, chunk=chunk
            )

        self._loop = BackgroundLoop()
        try:
            self._client = self._loop.run(load())
        except BaseException:
            self._loop.stop()
            raise

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        eos: Sequence[int] | None = None,
        journal: Path | None = None,
    ) -> Generation:
        """See AsyncClient.generate."""
        started = self._client.generate(
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            eos=eos,
            journal=journal,
        )
        return Generation(started, self._loop)

    def resume(self, journal: Path) -> Generation:
        """See AsyncClient.resume."""
        return Generation(self._client.resume(journal), self._loop)

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """See AsyncClient.chat_prompt."""
        return self._client.chat_prompt(messages)

    def describe(self) -> pb.DescribeResponse:
        """See AsyncClient.describe."""
        return self._loop.run(self._client.describe())

    def close(self) -> None:
        """Ends what still runs and lets the edge know."""
        if self._loop.running:
            self._loop.run(self._client.aclose())
            self._loop.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Generation:
    """An iterator over the chunks of one generation; see the asynchronous one of the same name."""

    def __init__(self, running: generation.Generation, loop: BackgroundLoop) -> None:
        self._generation = running
        self._loop = loop

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        try:
            return self._loop.run(self._generation.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    def cancel(self) -> None:
        """Ends the generation: the next chunk is the last, with finish reason "cancelled"."""
        self._loop.soon(self._generation.cancel)

    def close(self) -> None:
        """Ends the generation without another chunk."""
        self._loop.run(self._generation.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class BackgroundLoop:
    """An event loop on a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="trifold-client", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return not self._loop.is_closed()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine, which is cancelled when the wait for it is interrupted."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def soon(self, function: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(function)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
