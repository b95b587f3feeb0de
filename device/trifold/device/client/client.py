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
from trifold.shared.errors import InvalidRequest

T = TypeVar("T")


class Client:
    """Generates text with the device shard of a bundle here and the rest behind an edge.

    Any number of generations may run at once, and several threads may use one client. Use it as a context
    manager. `timeout` is for how many seconds an edge may be silent, or away once lost.
    """

    def __init__(
        self,
        edge: str = "127.0.0.1:50061",
        *,
        bundle: Path | str,
        timeout: float = 30.0,
        threads: int = 0,
        inexact: bool = False,
        chunk: int = 512,
        tls: Path | str | None = None,
        insecure: bool = False,
    ) -> None:
        """Loads the device part of the bundle in the folder `bundle`, or in its subfolder `device`.

        `edge` is HOST:PORT; it is not called yet. Prompts are sent in steps of `chunk` tokens, or of fewer
        where a tier allows only those. `threads` of the engine: 0 is one per core. New generations use the
        adapter version that is promoted in that folder, also while the client runs. With TLS as the node of
        the folder `tls`; without, on loopback only, unless that is `insecure`.

        Raises ConfigError for an edge that needs TLS, DamagedFile naming the file that is not
        what the manifest says, NotExact when the self-test fails here and `inexact` is not given.
        """

        async def load() -> async_client.AsyncClient:
            return async_client.AsyncClient(
                edge,
                bundle=bundle,
                timeout=timeout,
                threads=threads,
                inexact=inexact,
                chunk=chunk,
                tls=tls,
                insecure=insecure,
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
        logprobs: int | None = None,
        journal: Path | str | None = None,
    ) -> Generation:
        """Continues a text, or token ids, by at most `max_tokens` tokens.

        It ends at a token of `eos` (the model's own unless given) or where a string of `stop` begins.
        `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are no limit. The same arguments, `seed` among
        them, give the same tokens. With `logprobs` each chunk tells the probability of its token and of that
        many of the likeliest. What is committed goes to the new file `journal`, for resume().

        Returns an iterator of Chunk, which may raise any of the errors of the tiers, such as Unavailable when
        the edge is not there or was lost for longer than `timeout`.

        Raises PromptTooLong when the model has not that many positions, InvalidRequest for a parameter out of
        range, a journal that exists or a client that is closed.
        """
        started = self._client.generate(
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            eos=eos,
            logprobs=logprobs,
            journal=journal,
        )
        return Generation(started, self._loop)

    def resume(self, journal: Path | str) -> Generation:
        """Goes on with a generation of an earlier process, by its own parameters.

        Returns an iterator of Chunk; the first holds what was committed before. It stays on the adapter
        version that it began with.

        Raises DamagedFile naming the line, DigestMismatch when the journal belongs to another bundle or to an
        adapter version that is not here, InvalidRequest when another process uses it.
        """
        return Generation(self._client.resume(journal), self._loop)

    @property
    def adapter(self) -> str:
        """The digest of the adapter version that new generations use; empty for the bundle's own weights."""
        return self._client.adapter

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a chat that the assistant is to go on with.

        Raises UnsupportedModel when the model has no chat template.
        """
        return self._client.chat_prompt(messages)

    def describe(self) -> pb.DescribeResponse:
        """What the edge serves, its limits and load, and the tiers behind it. Raises Unavailable."""
        return self._loop.run(self._client.describe())

    def close(self) -> None:
        """Ends what still runs and lets the edge know; the client cannot be used again."""
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
        """Ends the generation without another chunk; a closed client has done that already."""
        if self._loop.running:
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
        """The result of a coroutine, which is cancelled when the wait for it is interrupted.

        Raises InvalidRequest after stop().
        """
        if not self.running:
            work.close()
            raise InvalidRequest("the client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def soon(self, function: Callable[[], object]) -> None:
        if self.running:
            self._loop.call_soon_threadsafe(function)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
