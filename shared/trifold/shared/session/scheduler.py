"""Turns at the engine: one thread computes, and sessions take turns, a step each."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")

_BRIEF_NS: Final = 3_000_000
"""For so long the event loop may be kept from everything else."""


@dataclass(frozen=True, slots=True)
class Turn(Generic[T]):
    """What a turn gave, how long it waited for the engine, and how long it took, in nanoseconds."""

    value: T
    queue_ns: int
    compute_ns: int


class Job(ABC, Generic[T]):
    """One piece of work in the line of `key`, and the future that waits for it in its event loop.

    `small` marks work that all takes about as long, such as a step of one row.
    """

    def __init__(self, key: Hashable, *, small: bool = False) -> None:
        self.key = key
        self.small = small
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Turn[T]] = self.loop.create_future()
        self.asked_ns = perf_counter_ns()

    @abstractmethod
    def finish(self) -> T:
        """The work, or what is left of it, on the engine."""

    def turn(self, value: T, compute_ns: int) -> Turn[T]:
        """What it comes to now, after so much of computing."""
        return Turn(value, perf_counter_ns() - self.asked_ns - compute_ns, compute_ns)

    def settle(self, outcome: Turn[T] | Exception) -> None:
        """In the event loop: gives the future its result, unless somebody has cancelled it."""
        if self.future.done():
            return
        if isinstance(outcome, Turn):
            self.future.set_result(outcome)
        else:
            self.future.set_exception(outcome)
            # Retrieved here: who waited may have left, with an earlier failure, and that is no complaint.
            self.future.exception()


class Call(Job[T]):
    """Any function as a job."""

    def __init__(self, key: Hashable, work: Callable[[], T], *, small: bool = False) -> None:
        super().__init__(key, small=small)
        self._work = work

    def finish(self) -> T:
        return self._work()


Lines = Mapping[Hashable, deque[Job[Any]]]
"""The jobs of each key, in order of turns: a key goes to the end when it has had one."""

Outcomes = Iterable[tuple[Job[Any], Turn[Any] | Exception]]


class TurnScheduler:
    """Runs work on one engine thread, round robin over keys: a long prompt delays others by a step, no more.

    Small work of one who is alone is done in the event loop, as long as it is brief: two changes of threads
    are a good part of what a token costs on loopback. Nobody else waits for it, but for that moment.
    """

    def __init__(self) -> None:
        self._lines: dict[Hashable, deque[Job[Any]]] = {}
        self._turn: Sequence[Job[Any]] = ()
        self._latest: Hashable = None
        self._small_ns = _BRIEF_NS
        self._stopped = False
        self._changed = threading.Condition()
        threading.Thread(target=self._serve, name="engine", daemon=True).start()

    def run(self, key: Hashable, work: Callable[[], T], *, small: bool = False) -> asyncio.Future[Turn[T]]:
        """Puts work in the line of `key`; the future has its turn, or the exception it raised."""
        return self.put(Call(key, work, small=small))

    def put(self, job: Job[T]) -> asyncio.Future[Turn[T]]:
        """As run()."""
        with self._changed:
            # The line of whoever has the turn may be forgotten already, and the engine still at it.
            alone = self._latest == job.key and not self._lines and not self._turn
            if not (alone and job.small and self._small_ns < _BRIEF_NS):
                self._lines.setdefault(job.key, deque()).append(job)
                self._changed.notify()
                return job.future
        _settle(self._compute((job,)))
        return job.future

    @property
    def waiting(self) -> int:
        """Keys whose work waits; any thread may ask."""
        return max(0, len(self._lines) - len(self._turn))

    def forget(self, key: Hashable) -> None:
        """Drops what waits in the line of `key`; what is running ends unheard."""
        with self._changed:
            jobs = [*self._lines.pop(key, ())]
        for job in jobs:
            job.future.cancel()

    def stop(self) -> None:
        """Drops what waits. The thread ends after the turn that is running, which nobody waits for."""
        with self._changed:
            self._stopped = True
            jobs = [job for line in self._lines.values() for job in line if job not in self._turn]
            self._lines.clear()
            self._changed.notify()
        for job in jobs:
            job.future.cancel()

    def pick(self, lines: Lines) -> Sequence[Job[Any]]:
        """Of the keys that wait, whose first jobs have the next turn together."""
        return (next(iter(lines.values()))[0],)

    def compute(self, jobs: Sequence[Job[Any]]) -> Outcomes:
        """On the engine: what the turn of these jobs came to; a job that is not among it goes on."""
        for job in jobs:
            started = perf_counter_ns()
            try:
                value = job.finish()
            except Exception as error:
                yield job, error
            else:
                yield job, job.turn(value, perf_counter_ns() - started)

    def _serve(self) -> None:
        while self._take_turn():
            pass

    def _take_turn(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._stopped)
            if self._stopped:
                return False
            jobs = self._turn = self.pick(self._lines)
            for job in jobs:
                self._lines[job.key] = self._lines.pop(job.key)
            self._latest = jobs[0].key if len(jobs) == 1 else None
        outcomes = [*self._compute(jobs)]
        with self._changed:
            self._turn = ()
            for job, _ in outcomes:
                self._leave(job)
            # What would go on waits no more.
            dropped = {*jobs} - {job for job, _ in outcomes} if self._stopped else ()
        # RuntimeError: the loop was closed while the engine worked, and nobody waits any more.
        with suppress(RuntimeError):
            loop = jobs[0].loop
            loop.call_soon_threadsafe(_settle, outcomes)
            for job in dropped:
                loop.call_soon_threadsafe(job.future.cancel)
        return True

    def _compute(self, jobs: Sequence[Job[Any]]) -> Outcomes:
        for job, outcome in self.compute(jobs):
            if job.small and len(jobs) == 1 and isinstance(outcome, Turn):
                self._small_ns = outcome.compute_ns
            yield job, outcome

    def _leave(self, job: Job[Any]) -> None:
        """Takes a job out of its line, unless that was forgotten meanwhile."""
        line = self._lines.get(job.key)
        if line and line[0] is job:
            line.popleft()
            if not line:
                del self._lines[job.key]


def _settle(outcomes: Outcomes) -> None:
    for job, outcome in outcomes:
        job.settle(outcome)
