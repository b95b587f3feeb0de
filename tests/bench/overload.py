"""Overload: a site asked for more than it can give, in an open loop.

First the peak: so many callers at once, each asking again as soon as it is answered. Then, in turn with the
peak, they come by chance, at a rate that does not mind the answers, up to five times what the peak answered;
none comes again. A row is the median of several such turns, its share of the peak that of the same turn.
Once these are clients of OpenAI's API at `trifold device serve`, and once devices at `trifold edge serve`:
these speak the wire without a shard of their own, so that edge and core are what is measured. All of it, the
callers too, shares one machine.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple

from tests.bench.nano import split_nano
from tests.processes import Processes
from tests.site import Service
from tests.wire import Peer
from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import Overloaded, TrifoldError
from trifold.shared.session.announcement import announcement

TOKENS: Final = 32
PROMPT: Final = (7, 8, 9, 10)
CALLERS: Final = (4, 16, 64)
LOADS: Final = (0.8, 1.0, 2.0, 5.0)
TURNS: Final = 3
DEVICES: Final = 32
"""Connections to the edge, each of which callers share."""
SECONDS: Final = 10.0
WARM_UP: Final = 6.0
"""Seconds before the ones that count: by then as many answers run as ever will."""


class Answer(NamedTuple):
    """What somebody got: `first` is in seconds from asking to the first token, or to the refusal.

    `began` and `ended` are times of perf_counter().
    """

    tokens: int
    refused: bool
    first: float
    began: float
    ended: float


Ask = Callable[[], Awaitable[Answer]]


def main() -> None:
    asyncio.run(_main())


async def _main() -> None:
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder:
        bundle = split_nano(Path(folder) / "nano")
        with Processes(bundle, "--threads", "1") as tiers:
            with Service(tiers, Path(folder) / "journals", "--threads", "1") as service:
                print("\nClients of `trifold device serve`, which gives 16 answers at a time\n")
                await _measure(lambda: _ask_over_http(service.url))
            print("\nDevices of `trifold edge serve`, which has 64 sessions at a time\n")
            async with _devices(tiers) as ask:
                await _measure(ask)


@dataclass(frozen=True)
class Figures:
    """Of SECONDS: what was given whole and what was refused, a second, and how fast, in milliseconds.

    An answer that began before or ended later counts by its part in them: many end at the same time.
    """

    failed: int
    goodput: float
    first: tuple[float, float]
    refused: float
    refusal: tuple[float, float]

    @classmethod
    def of(cls, answers: Sequence[Answer], since: float) -> Figures:
        """Of the SECONDS `since` that time."""
        until = since + SECONDS
        ended = [answer for answer in answers if since <= answer.ended < until]
        given = [answer for answer in ended if answer.tokens]
        refused = [answer for answer in ended if answer.refused]
        tokens = 0.0
        for answer in answers:
            part = max(0.0, min(answer.ended, until) - max(answer.began, since))
            tokens += answer.tokens * part / (answer.ended - answer.began)
        return cls(
            failed=len(ended) - len(given) - len(refused),
            goodput=tokens / SECONDS,
            first=_percentiles([answer.first for answer in given]),
            refused=len(refused) / SECONDS,
            refusal=_percentiles([answer.first for answer in refused]),
        )


async def _measure(ask: Ask) -> None:
    cells = "tokens/s | of the peak | first token p50, ms | p99 | refused/s | refusal p50, ms | p99"
    print(f"| load | {cells} | failed |")
    print("|---|---|---|---|---|---|---|---|---|")
    alone = {callers: (await _closed(ask, callers)).goodput for callers in CALLERS}
    callers = max(alone, key=lambda callers: alone[callers])
    rates = {load: load * alone[callers] / TOKENS for load in LOADS}
    turns = [
        [await _closed(ask, callers)] + [await _open(ask, rate) for rate in rates.values()]
        for _ in range(TURNS)
    ]
    peaks = [turn[0].goodput for turn in turns]
    names = [f"the peak: {callers} callers, closed loop"]
    names += [f"{load:g} x the peak: {rate:.0f} a second" for load, rate in rates.items()]
    for name, figures in zip(names, zip(*turns, strict=True), strict=True):
        _row(name, figures, peaks)


def _row(name: str, turns: Sequence[Figures], peaks: Sequence[float]) -> None:
    shares = [turn.goodput / peak for turn, peak in zip(turns, peaks, strict=True)]
    cells = [
        name,
        f"{median(turn.goodput for turn in turns):.0f}",
        f"{median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})",
        *_medians([turn.first for turn in turns]),
        f"{median(turn.refused for turn in turns):.1f}",
        *_medians([turn.refusal for turn in turns]),
        str(sum(turn.failed for turn in turns)),
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


def _medians(turns: Sequence[tuple[float, float]]) -> tuple[str, str]:
    """Of p50 and of p99, with the least and the largest of these."""
    p50s, p99s = zip(*turns, strict=True)
    if isnan(median(p50s)):
        return "", ""
    return f"{median(p50s):.0f}", f"{median(p99s):.0f} ({min(p99s):.0f} to {max(p99s):.0f})"


def _percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """p50 and p99 in milliseconds; NaN where there was nothing."""
    if not seconds:
        return nan, nan
    ordered = sorted(seconds)
    p50, p99 = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return 1000 * p50, 1000 * p99


async def _closed(ask: Ask, callers: int) -> Figures:
    """So many callers, each of which asks again when it has its answer."""
    answers: list[Answer] = []

    async def ask_again() -> None:
        while not over.is_set():
            answers.append(await ask())

    over = asyncio.Event()
    return await _counted(answers, over, [asyncio.create_task(ask_again()) for _ in range(callers)])


async def _open(ask: Ask, rate: float) -> Figures:
    """Callers who come by chance, `rate` of them a second (a Poisson process)."""
    answers: list[Answer] = []
    asked: set[asyncio.Task[None]] = set()

    async def ask_once() -> None:
        answers.append(await ask())

    async def come() -> None:
        at = time.perf_counter()
        while not over.is_set():
            at += random.expovariate(rate)
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            task = asyncio.create_task(ask_once())
            asked.add(task)
            task.add_done_callback(asked.discard)

        await asyncio.gather(*asked)

    over = asyncio.Event()
    return await _counted(answers, over, [asyncio.create_task(come())])


async def _counted(answers: list[Answer], over: asyncio.Event, running: list[asyncio.Task[None]]) -> Figures:
    """Of the seconds that count; nobody asks again when these are `over`, but all get their answers."""
    since = time.perf_counter() + WARM_UP
    await asyncio.sleep(WARM_UP + SECONDS)
    over.set()
    await asyncio.gather(*running)
    return Figures.of(answers, since)


async def _ask_over_http(url: str) -> Answer:
    """Over a connection of its own, by hand: a whole client would take more of the machine than that."""
    host, _, port = url.split("/")[2].partition(":")
    asked = {
        "model": "trifold",
        "prompt": "import os\n",
        "max_tokens": TOKENS,
        "temperature": 1,
        "seed": random.getrandbits(32),
        "stream": True,
    }
    body = json.dumps(asked)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    began = time.perf_counter()
    tokens, first, refused, whole = 0, 0.0, False, False
    try:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        refused = b" 429 " in await reader.readline()
        first = time.perf_counter() - began
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                tokens += 1
                first = time.perf_counter() - began if tokens == 1 else first
            whole = whole or line.startswith(b"data: [DONE]")
        writer.close()
    except OSError:
        refused = False
    return Answer(tokens if whole else 0, refused, first, began, time.perf_counter())


@asynccontextmanager
async def _devices(tiers: Processes) -> AsyncIterator[Ask]:
    async with AsyncExitStack() as stack:
        devices = [Peer.apart(tiers.edge, "EdgeService") for _ in range(DEVICES)]
        peers = [await stack.enter_async_context(device) for device in devices]
        digest = (await peers[0].describe()).serving_digest

        async def ask() -> Answer:
            talk = random.choice(peers).call(*announcement(pb.Open(epoch=1)))
            began, first, tokens, refused = time.perf_counter(), 0.0, 0, False
            try:
                await talk.open(digest, capacity=len(PROMPT) + TOKENS)
                await talk.send_tokens(PROMPT, 0)
                await talk.result()
                first = time.perf_counter() - began
                for position in range(len(PROMPT), len(PROMPT) + TOKENS - 1):
                    await talk.send_tokens([position], position)
                    await talk.result()
                await talk.close()
                tokens = TOKENS
            except Overloaded:
                first, refused = time.perf_counter() - began, True
            except TrifoldError:
                pass
            finally:
                await talk.drop()
            return Answer(tokens, refused, first, began, time.perf_counter())

        yield ask
