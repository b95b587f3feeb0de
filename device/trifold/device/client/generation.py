"""A generation: the loop that asks for rows, decides on tokens, and shows text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from trifold.device.client.journal import Journal, Request
from trifold.device.client.link import Link
from trifold.device.client.tail import Decision, Tail
from trifold.device.client.text import FinishReason, Transcript
from trifold.device.client.timing import Timing
from trifold.device.client.trace import Trace, Work, trace
from trifold.shared.errors import Cancelled
from trifold.shared.runtime.sampling import Logprobs


@dataclass(frozen=True)
class Chunk:
    """A piece of a generation as it comes: mostly one token, and the text that it makes certain.

    `text` may be empty while a character is incomplete or a stop string is possible. `finish_reason` is set
    on the last chunk. `replayed` marks what a resumed generation had committed before; only tokens computed
    now have a `trace` and, where they were asked for, `logprobs`.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    trace: Trace | None = None
    replayed: bool = False
    logprobs: Logprobs | None = None


class Generation:
    """An asynchronous iterator over the chunks of one generation.

    It begins with the first chunk asked for. Whether it is read to its end, cancelled, closed or forgotten,
    the tiers are told to free what they hold for it.
    """

    def __init__(
        self, journal: Journal, tail: Tail, link: Link, transcript: Transcript, timing: Timing
    ) -> None:
        self._journal = journal
        self._link = link
        self._awaited = False
        self._chunks = _generate(journal, tail, link, transcript, timing)

    @property
    def request(self) -> Request:
        """What is generated."""
        return self._journal.request

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        self._awaited = True
        try:
            return await anext(self._chunks)
        finally:
            self._awaited = False

    def cancel(self) -> None:
        """Ends the generation: the next chunk is the last, with finish reason "cancelled"."""
        self._link.give_up()

    async def aclose(self) -> None:
        """Ends the generation; where nobody waits for a chunk, without another one."""
        self._link.give_up()
        if not self._awaited:
            await self._chunks.aclose()
            self._journal.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


async def _generate(
    journal: Journal, tail: Tail, link: Link, transcript: Transcript, timing: Timing
) -> AsyncGenerator[Chunk, None]:
    try:
        with timing:
            async with link:
                chunk = _replay(journal, transcript)
                if chunk.token_ids and not chunk.finish_reason:
                    yield chunk
                while not transcript.finish_reason:
                    decision, works = await _next_token(tail, link)
                    text = transcript.push(decision.token)
                    if not transcript.finish_reason:
                        link.send_ahead()
                        await asyncio.sleep(
                            0
                        )  # it leaves now: the tiers work while the caller has this token
                    how = trace(decision.position, decision.row_digest, works, exact=link.exact)
                    timing.token(how, works)
                    chunk = Chunk(
                        text, (decision.token,), transcript.finish_reason, how, logprobs=decision.logprobs
                    )
                    if not chunk.finish_reason:
                        yield chunk
    except Cancelled:
        chunk = Chunk(transcript.finish("cancelled"), finish_reason="cancelled")
    finally:
        journal.close()
    yield chunk  # the last one, when the session is closed and the journal free


def _replay(journal: Journal, transcript: Transcript) -> Chunk:
    text = "".join(transcript.push(token) for token in journal.tokens)
    return Chunk(text, tuple(journal.tokens), transcript.finish_reason, replayed=True)


async def _next_token(tail: Tail, link: Link) -> tuple[Decision, list[Work]]:
    """Receives rows until they decide on a token; it is committed when this returns."""
    works: list[Work] = []
    while True:
        delivery = await link.receive(tail.needed)
        work, decision = await tail.work(delivery)
        works.append(work)
        if decision:
            return decision, works
