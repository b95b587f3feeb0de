"""Turns at the engine: one thread computes, and sessions take turns, a step each."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Hashable
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


class TurnScheduler:
    """Runs work on one engine thread, round robin over keys: a long prompt delays others by a step, no more.

    Small work of one who is alone is done in the event loop, as long as it is brief: two changes of threads
    are a good part of what a token costs on loopback. Nobody else waits for it, but for that moment.
    This is the place where steps of several sessions would become one batch.
    """

    def __init__(self) -> None:
        # In order of turns: a key goes to the end of the dictionary when it has had one.
        self._lines: dict[Hashable, deque[_Job]] = {}
        self._running: tuple[Hashable, _Job] | None = None
        self._latest: Hashable = None
        self._small_ns = _BRIEF_NS
        self._stopped = False
        self._changed = threading.Condition()
        threading.Thread(target=self._serve, name="engine", daemon=True).start()

    def run(self, key: Hashable, work: Callable[[], T], *, small: bool = False) -> asyncio.Future[Turn[T]]:
        """Puts work in the line of `key`; the future has its turn, or the exception it raised.

        `small` marks work that all takes about as long, such as a step of one row.
        """
        job = _Job(work, small, asyncio.get_running_loop())
        with self._changed:
            alone = self._latest == key and not self._lines and self._running is None
            if not (alone and small and self._small_ns < _BRIEF_NS):
                self._lines.setdefault(key, deque()).append(job)
                self._changed.notify()
                return job.future
        job.settle(self._compute(job))
        return job.future

    @property
    def waiting(self) -> int:
        """Keys whose work waits; any thread may ask."""
        return len(self._lines)

    def forget(self, key: Hashable) -> None:
        """Drops what waits in the line of `key`; what is running ends unheard."""
        with self._changed:
            jobs = [*self._lines.pop(key, ())]
            if self._running and self._running[0] == key:
                jobs.append(self._running[1])
        for job in jobs:
            job.future.cancel()

    def stop(self) -> None:
        """Drops what waits. The thread ends after the turn that is running, which nobody waits for."""
        with self._changed:
            self._stopped = True
            jobs = [job for line in self._lines.values() for job in line]
            self._lines.clear()
            self._changed.notify()
        for job in jobs:
            job.future.cancel()

    def _serve(self) -> None:
        while self._take_turn():
            pass

    def _take_turn(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._stopped)
            if self._stopped:
                return False
            key = next(iter(self._lines))
            line = self._lines.pop(key)
            job = line.popleft()
            if line:
                self._lines[key] = line
            self._running = key, job
            self._latest = key
        outcome = self._compute(job)
        with self._changed:
            self._running = None
        # RuntimeError: the loop was closed while the engine worked, and nobody waits any more.
        with suppress(RuntimeError):
            job.loop.call_soon_threadsafe(job.settle, outcome)
        return True

    def _compute(self, job: _Job) -> Turn[Any] | Exception:
        started = perf_counter_ns()
        try:
            value = job.work()
        except Exception as error:
            return error
        taken = perf_counter_ns() - started
        if job.small:
            self._small_ns = taken
        return Turn(value, started - job.asked_ns, taken)


class _Job:
    """One piece of work and the future that waits for it in its event loop."""

    def __init__(self, work: Callable[[], Any], small: bool, loop: asyncio.AbstractEventLoop) -> None:
        self.work = work
        self.small = small
        self.loop = loop
        self.future: asyncio.Future[Turn[Any]] = loop.create_future()
        self.asked_ns = perf_counter_ns()

    def settle(self, outcome: Turn[Any] | Exception) -> None:
        """In the event loop: gives the future its result, unless somebody has cancelled it."""
        if self.future.done():
            return
        if isinstance(outcome, Turn):
            self.future.set_result(outcome)
        else:
            self.future.set_exception(outcome)
            # Retrieved here: who waited may have left, with an earlier failure, and that is no complaint.
            self.future.exception()
