"""The fuzzer: says mutated things to one RPC, and keeps what reaches lines that nothing else did."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Final

import grpc.aio
import numpy as np
from google.protobuf import descriptor_pool, message_factory

from tests.fuzzing.mutation import Mutator, Said
from tests.fuzzing.reach import Marks, Reach
from trifold.shared.session.ending import Ending

HANG: Final = 1.0
"""Seconds in which a service has to say something, or to end the call."""

SESSION: Final = b"<session's name>"
"""Stands for 16 bytes of every call's own."""

_EVERY: Final = 50
"""Calls between two steps of the neighbour."""

_LISTENS: Final = 4
"""Answers after which the caller leaves: a generation may have a thousand."""

_AGAIN: Final = 3
"""How often a call that took too long is repeated: a busy machine does not hang each time."""

_NEVER: Final = {"INTERNAL", "UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED"}
"""What no caller is to bring about by what it says."""

_COMPLAINTS: Final = ("internal error", "Unexpected [", "never retrieved", "grpc_call_error", "Exception in")
"""Of ours, of gRPC's and of asyncio's. That a status did not reach a caller who left, gRPC tells too."""


@dataclass(frozen=True)
class Target:
    """One RPC: its path, a channel to it, what honest callers say, and one who is served beside the fuzzer.

    `reach` is what the process of the service reaches, `log` what it printed so far; `fresh` makes what an
    honest caller uses once.
    """

    path: str
    channel: grpc.aio.Channel
    seeds: Sequence[Said]
    neighbour: Callable[[], Awaitable[None]]
    reach: Reach
    log: Callable[[], str]
    fresh: Mapping[bytes, Callable[[], bytes]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    def method(self) -> Any:
        service, _, name = self.path[1:].partition("/")
        return descriptor_pool.Default().FindServiceByName(service).FindMethodByName(name)


@dataclass
class Report:
    """`refused` are the malformed ones of `tried`; `faults` tell what was said and what came of it.

    `by_seeds` and `reached` are marks of Reach: what honest calls reached, and all.
    """

    tried: int = 0
    refused: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    slow_once: int = 0
    corpus: int = 0
    steps: int = 0
    by_seeds: Marks = field(default_factory=lambda: np.zeros(0, np.bool_))
    reached: Marks = field(default_factory=lambda: np.zeros(0, np.bool_))
    faults: list[str] = field(default_factory=list)


class Fuzzer:
    """Of one target; what it says follows from `seed` and from what that reaches."""

    def __init__(self, target: Target, seed: int = 0) -> None:
        self._target = target
        method = target.method()
        self._streams = method.client_streaming
        self._mutator = Mutator(message_factory.GetMessageClass(method.input_type), seed)
        self._random = random.Random(seed)
        self._call: grpc.aio.StreamStreamMultiCallable[bytes, bytes]
        self._call = target.channel.stream_stream(target.path)
        self._corpus: list[Said] = list(target.seeds)
        self._report = Report()

    async def run(self, count: int) -> Report:
        """Goes on until `count` calls with something malformed have been refused."""
        report, reach = self._report, self._target.reach
        reach.clear()
        for said in self._target.seeds:
            await self.say(said)
        seen = reach.snapshot()
        report.by_seeds = seen
        while report.refused < count and len(report.faults) < 20:
            said = self._mutator.mutated(self._chosen(), self._corpus, stream=self._streams)
            await self._try(said)
            now = reach.snapshot()
            if np.any(now & ~seen):
                seen = seen | now
                self._corpus.append(said)
        log = self._target.log()
        if any(complaint in log for complaint in _COMPLAINTS):
            report.faults.append(f"in its log: {log[-2000:]}")
        report.corpus = len(self._corpus)
        report.reached = seen
        return report

    def _chosen(self) -> Said:
        """One of the latest finds as often as any."""
        latest = self._corpus[-8:]
        return self._random.choice(latest if self._random.random() < 0.3 else self._corpus)

    async def _try(self, said: Said) -> None:
        report = self._report
        if report.tried % _EVERY == 0:
            (reason, seconds), _ = await asyncio.gather(self.say(said), self._target.neighbour())
            report.steps += 1
        else:
            reason, seconds = await self.say(said)
        report.tried += 1
        report.reasons[reason] += 1
        report.refused += reason != "OK"
        report.slowest = max(report.slowest, seconds)
        if seconds > HANG and reason not in _NEVER:
            again = [(await self.say(said))[1] for _ in range(_AGAIN)]
            if min(again) > HANG:
                report.faults.append(f"{min(again):.1f} s: {_shown(said)}")
            else:
                report.slow_once += 1
        if reason in _NEVER:
            report.faults.append(f"{reason}: {_shown(said)}")

    async def say(self, said: Said) -> tuple[str, float]:
        """What the last call ended with, and the longest silence in any of them."""
        fresh = {SESSION: secrets.token_bytes(16)}
        fresh |= {
            name: make() for name, make in self._target.fresh.items() if any(name in m for m in said if m)
        }
        reason, longest = "OK", 0.0
        for messages, last in _calls(said):
            for name, value in fresh.items():
                messages = [message.replace(name, value) for message in messages]
            reason, seconds = await self._speak(messages, leaves=not last)
            longest = max(longest, seconds)
        return reason, longest

    async def _speak(self, messages: Sequence[bytes], *, leaves: bool) -> tuple[str, float]:
        call = self._call(wait_for_ready=True)
        ending = Ending(call, "the service")
        responses = aiter(call)
        heard, longest, since = 0, 0.0, time.perf_counter()
        try:
            async with asyncio.timeout(30):
                with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    for message in messages:
                        await call.write(message)
                    if not leaves:
                        await call.done_writing()
                # What takes time to be sent is no silence of the service's.
                since = time.perf_counter()
                while heard < (leaves or _LISTENS) and await anext(responses, None) is not None:
                    now = time.perf_counter()
                    heard, longest, since = heard + 1, max(longest, now - since), now
        except grpc.aio.AioRpcError:
            longest = max(longest, time.perf_counter() - since)
            return (await ending.error()).reason, longest
        except TimeoutError:
            longest = 30.0
        finally:
            call.cancel()
        return "OK", max(longest, time.perf_counter() - since)


def _calls(said: Said) -> Iterator[tuple[list[bytes], bool]]:
    """The messages of each call, and whether it is the last."""
    calls = [
        [m for m in group if m is not None] for none, group in groupby(said, lambda m: m is None) if not none
    ]
    for number, messages in enumerate(calls or [[]], 1):
        yield messages, number >= len(calls)


def _shown(said: Said) -> str:
    return " ".join("|" if message is None else message.hex()[:2000] or "-" for message in said)
