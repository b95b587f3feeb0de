"""Overload: OpenAI's API of a site asked for more than it can give, in an open loop.

First the peak: so many clients at once, each asking again as soon as it is answered. Then requests come by
chance, at a rate that does not mind the answers, up to five times what the peak answered. Nobody asks again.
Who refuses is either `trifold device serve`, or, where that takes everybody, the edge behind it.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx

from tests.bench.nano import split_nano
from tests.processes import Processes
from tests.site import Service

TOKENS: Final = 32
CLIENTS: Final = (4, 16, 64)
LOADS: Final = (0.8, 1.0, 2.0, 5.0)
SECONDS: Final = 30.0
WARM_UP: Final = 10.0
"""Seconds before the ones that count: by then as many answers run as ever will."""

NO_LIMIT: Final = 1000


class Answer(NamedTuple):
    """Seconds from the request to the first token, or to the refusal; `ended` is a time of perf_counter()."""

    status: int
    whole: bool
    tokens: int
    first: float
    ended: float


def main() -> None:
    asyncio.run(_main())


async def _main() -> None:
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder:
        bundle = split_nano(Path(folder) / "nano")
        for who, at_service, at_tiers in (("device", 16, NO_LIMIT), ("edge", NO_LIMIT, 64)):
            print(f"\nRefused by `trifold {who} serve`, which takes {min(at_service, at_tiers)} at a time\n")
            with (
                Processes(bundle, "--threads", "1", "--streams", str(at_tiers)) as tiers,
                Service(tiers, Path(folder) / who, "--threads", "1", "--streams", str(at_service)) as service,
            ):
                await _site(service.url)


async def _site(url: str) -> None:
    cells = "answered/s | tokens/s in time | of the peak | first token p50, s | p99"
    print(f"| load | {cells} | refused/s | refusal p50, ms | p99 |")
    print("|---|---|---|---|---|---|---|---|---|")
    async with _client(url) as client:
        peak = 0.0
        for clients in CLIENTS:
            answers = await _closed(client, clients)
            peak = max(peak, _row(f"{clients} clients, closed loop", answers, peak))
        for load in LOADS:
            rate = load * peak / TOKENS
            _row(f"{load:g} x the peak: {rate:.1f} requests/s", await _open(client, rate), peak)


def _row(load: str, answers: Sequence[Answer], peak: float) -> float:
    """Prints it and returns the tokens a second."""
    given = [answer for answer in answers if answer.whole]
    refused = [answer for answer in answers if answer.status == 429]
    if failed := len(answers) - len(given) - len(refused):
        load += f" ({failed} failed)"
    goodput = sum(answer.tokens for answer in given) / SECONDS
    cells = [
        load,
        f"{len(given) / SECONDS:.1f}",
        f"{goodput:.0f}",
        f"{goodput / peak:.0%}" if peak else "",
        *(f"{seconds:.2f}" for seconds in _percentiles([answer.first for answer in given])),
        f"{len(refused) / SECONDS:.1f}",
        *(f"{1000 * seconds:.0f}" for seconds in _percentiles([answer.first for answer in refused])),
    ]
    print(f"| {' | '.join(cells)} |", flush=True)
    return goodput


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    """p50 and p99; not a number where there are no values."""
    ordered = sorted(values) or [float("nan")]
    return ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


async def _closed(client: httpx.AsyncClient, clients: int) -> list[Answer]:
    """So many clients, each of which asks again when it has its answer."""
    answers: list[Answer] = []

    async def ask_again() -> None:
        while True:
            answers.append(await _ask(client))

    return await _counted(answers, [asyncio.create_task(ask_again()) for _ in range(clients)])


async def _open(client: httpx.AsyncClient, rate: float) -> list[Answer]:
    """Requests that come by chance, `rate` of them a second (a Poisson process)."""
    answers: list[Answer] = []
    asked: set[asyncio.Task[None]] = set()

    async def ask() -> None:
        answers.append(await _ask(client))

    async def come() -> None:
        at = time.perf_counter()
        while True:
            at += random.expovariate(rate)
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            task = asyncio.create_task(ask())
            asked.add(task)
            task.add_done_callback(asked.discard)

    counted = await _counted(answers, [asyncio.create_task(come())])
    await asyncio.wait(asked)
    return counted


async def _counted(answers: list[Answer], running: list[asyncio.Task[None]]) -> list[Answer]:
    """The answers that ended in the seconds that count."""
    began = time.perf_counter() + WARM_UP
    await asyncio.sleep(WARM_UP + SECONDS)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    return [answer for answer in answers if began <= answer.ended < began + SECONDS]


async def _ask(client: httpx.AsyncClient) -> Answer:
    asked = {
        "model": "trifold",
        "prompt": "import os\n",
        "max_tokens": TOKENS,
        "temperature": 1,
        "seed": random.getrandbits(32),
        "stream": True,
    }
    began = time.perf_counter()
    first, tokens, status, whole = 0.0, 0, 0, False
    try:
        async with client.stream("POST", "completions", json=asked) as response:
            status = response.status_code
            async for line in response.aiter_lines():
                first = first or time.perf_counter() - began
                whole = whole or line == "data: [DONE]"
                tokens += line.startswith("data: {") and _is_token(json.loads(line[6:]))
    except httpx.HTTPError:
        whole = False
    ended = time.perf_counter()
    return Answer(status, whole, tokens, first or ended - began, ended)


def _is_token(event: dict[str, Any]) -> bool:
    return bool(event.get("choices"))


@asynccontextmanager
async def _client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60.0, trust_env=False) as client:
        yield client
