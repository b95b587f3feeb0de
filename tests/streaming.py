"""Sessions that stream side by side without a pause, every token compared with the monolith's."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from trifold.device import AsyncClient, Chunk, Sampling
from trifold.device.client.generation import Generation
from trifold.shared.errors import TrifoldError, Unavailable
from trifold.shared.runtime.monolith import Monolith, Token

_AHEAD: Final = 8
"""A session is in mid-generation when it has had a token and so many are still to come."""

_LOOK: Final = 0.002


@dataclass(frozen=True)
class Job:
    """One generation: what is asked, and what the monolith answers."""

    prompt: tuple[int, ...]
    sampling: Sampling
    tokens: tuple[Token, ...]

    @classmethod
    def ask(cls, monolith: Monolith, prompt: Sequence[int], sampling: Sampling, tokens: int) -> Self:
        return cls(tuple(prompt), sampling, tuple(monolith.generate(prompt, sampling, tokens, eos=())))

    def start(self, client: AsyncClient) -> Generation:
        """The same, asked of tiers."""
        return client.generate(
            self.prompt,
            max_tokens=len(self.tokens),
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            seed=self.sampling.seed,
            eos=(),
        )


@dataclass
class Tally:
    """What was compared, and what was wrong with it; `failures` are generations that ended with an error."""

    tokens: int = 0
    lost: int = 0
    repeated: int = 0
    changed: int = 0
    rows_changed: int = 0
    resumes: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def wrong(self) -> int:
        return self.lost + self.repeated + self.changed + self.rows_changed + self.failures.total()

    def add(self, job: Job, chunks: Sequence[Chunk]) -> None:
        """Compares a generation with the monolith's, position by position."""
        traces = [chunk.trace for chunk in chunks if chunk.trace]
        got = Counter(trace.position for trace in traces)
        wanted = {token.position: token for token in job.tokens}
        self.tokens += len(wanted)
        self.lost += len(wanted.keys() - got.keys())
        self.repeated += got.total() - len(got) + len(got.keys() - wanted.keys())
        for chunk in chunks:
            if chunk.trace and (token := wanted.get(chunk.trace.position)):
                self.changed += chunk.token_ids != (token.id,)
                self.rows_changed += chunk.trace.row_digest != token.row_digest
        self.resumes += sum(trace.resumed for trace in traces)


@dataclass
class Session:
    """Where one of the sessions is in what it generates."""

    position: int = 0
    left: int = 0
    tokens: int = 0
    resumes: int = 0

    @property
    def in_mid_generation(self) -> bool:
        return self.left >= _AHEAD

    def note(self, chunk: Chunk) -> None:
        assert chunk.trace, "a token that was not computed now"
        self.position = chunk.trace.position
        self.left -= 1
        self.tokens += 1
        self.resumes += chunk.trace.resumed


@dataclass(frozen=True)
class Hit:
    """A session that a loss hit in mid-generation: its position then, and the seconds to its next token."""

    position: int
    seconds: float


class Streaming:
    """A context. Each of `sessions` takes one job after the other, endlessly, and adds it to `tally`."""

    def __init__(self, client: AsyncClient, jobs: Sequence[Job], sessions: int) -> None:
        self.tally = Tally()
        self._client = client
        self._jobs = itertools.cycle(jobs)
        self._sessions = [Session() for _ in range(sessions)]
        self._leaving = False
        self._running: list[asyncio.Task[None]] = []

    async def hits(self, lose: Callable[[], Awaitable[None]], *, resumes: bool = True) -> list[Hit]:
        """Lets a loss happen while every session is in mid-generation, and waits until all of them go on.

        The seconds are from the beginning of the loss, which `lose` brings to its end. A loss that breaks no
        connection `resumes` nothing: a session goes on then with its second token, as one may be on its way.
        """
        while not all(session.in_mid_generation for session in self._sessions):
            await self._look()
        losing, began = asyncio.ensure_future(lose()), time.perf_counter()
        before = [(session, session.position, session.tokens, session.resumes) for session in self._sessions]
        hits = []
        while before or not losing.done():
            await self._look()
            for one in before.copy():
                session, position, tokens, resumed = one
                if session.resumes > resumed if resumes else losing.done() and session.tokens > tokens + 1:
                    hits.append(Hit(position, time.perf_counter() - began))
                    before.remove(one)
        await losing
        return hits

    async def __aenter__(self) -> Self:
        self._running = [asyncio.create_task(self._stream(session)) for session in self._sessions]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Lets what runs come to its end, unless by an error."""
        self._leaving = True
        if error:
            for task in self._running:
                task.cancel()
        ends = await asyncio.gather(*self._running, return_exceptions=True)
        if not error:
            for end in ends:
                if end:
                    raise end

    async def _look(self) -> None:
        """Pauses. Raises what has ended a session, which by itself goes on for ever."""
        for task in self._running:
            if task.done():
                task.result()
        await asyncio.sleep(_LOOK)

    async def _stream(self, session: Session) -> None:
        while not self._leaving:
            job = next(self._jobs)
            chunks: list[Chunk] = []
            try:
                while not chunks:
                    # A first open is not repeated by the client: what answers it may just have been lost.
                    with suppress(Unavailable):
                        await self._generate(session, job, chunks)
            except TrifoldError as failure:
                self.tally.failures[f"{failure.reason}: {failure.message}"] += 1
            self.tally.add(job, chunks)

    async def _generate(self, session: Session, job: Job, chunks: list[Chunk]) -> None:
        session.left = 0
        generation = job.start(self._client)
        async for chunk in generation:
            if not chunks:
                session.left = len(job.tokens)
            chunks.append(chunk)
            session.note(chunk)
