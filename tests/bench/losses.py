"""Losses under load: core and edge killed, both links cut and stalled, while sessions stream side by side.

A loss happens when every session is in mid-generation, around position 256, and counts only if each of them
then went on. The seconds are those that a session was without a token: from the loss to its next token, which
includes the restart of a process that was killed, or the length of a stall. Every token and the row that
predicted it are compared with the monolith's, by position.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from tests.bench.nano import held_out, split_nano, tokenizer
from tests.network.proxy import Proxy
from tests.processes import Processes, Service
from tests.streaming import Hit, Job, Streaming, Tally
from trifold.device import AsyncClient, Sampling
from trifold.shared.cli.service_process import ServiceProcess
from trifold.shared.runtime.monolith import Monolith

KILLS: Final = 200
"""Of the core: half as many of the edge, and for each way to break a link; there are five."""

SESSIONS: Final = 8
JOBS: Final = 64
PROMPTS: Final = (200, 248)
TOKENS: Final = 80
TELL: Final = 20
STALLED: Final = "stalled"

_LONGEST: Final = 1.0
"""Seconds that a link stalls or is down."""

Loss = Callable[[], Awaitable[None]]
Break = Callable[[Proxy], Awaitable[None]]
Lost = tuple[str, int, list[Hit], Tally]
"""What was lost, how often, whom that hit, and what was compared meanwhile."""


def main(count: int = KILLS) -> None:
    """`count` kills of the core, and of everything else so many as belong to that."""
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder:
        bundle = split_nano(Path(folder) / "bundle")
        jobs = list(_jobs(Monolith.load(bundle, threads=1)))
        rows = asyncio.run(_lose_all(bundle, jobs, count))
    print(f"\n{SESSIONS} sessions at a time, each hit by every loss; {TOKENS} tokens a generation\n")
    print(
        "| lost | times | sessions hit | mean position | tokens compared | lost | repeated | changed "
        "| rows that differ | resumes | seconds without a token: p50 | p99 | longest |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    wrong = 0
    for what, times, hits, tally in rows:
        print(_row(what, times, hits, tally))
        wrong += tally.wrong
        for failure, often in tally.failures.items():
            print(f"failed, {often} times: {failure}")
    if wrong:
        sys.exit("losses cost tokens: the split is not identical to the monolith")


async def _lose_all(bundle: Path, jobs: list[Job], count: int) -> list[Lost]:
    half = -(-count // 2)
    lost = [await _kill("cloud", bundle, jobs, count), await _kill("edge", bundle, jobs, half)]
    return lost + [each async for each in _break_links(bundle, jobs, half)]


async def _kill(service: Service, bundle: Path, jobs: list[Job], times: int) -> Lost:
    with Processes(bundle, "--threads", "1") as tiers:

        async def kill() -> None:
            tiers.kill(service)
            await asyncio.to_thread(tiers.start, service)

        async with _client(tiers.edge, bundle) as client:
            return await _lose(f"{service}, killed", client, jobs, [kill], times)


async def _break_links(bundle: Path, jobs: list[Job], times: int) -> AsyncIterator[Lost]:
    """Both links in turn."""
    serve = [str(bundle), "--threads", "1", "--listen", "127.0.0.1:0"]
    with ServiceProcess(["cloud", "serve", *serve]) as core:
        async with Proxy(core.address) as inner:
            with ServiceProcess(["edge", "serve", *serve, "--core", inner.address]) as edge:
                async with Proxy(edge.address) as outer, _client(outer.address, bundle) as client:
                    for what, broken in _breaks().items():
                        ways = [partial(broken, link) for link in (outer, inner)]
                        yield await _lose(
                            f"a link, {what}", client, jobs, ways, times, resumes=what != STALLED
                        )


def _breaks() -> dict[str, Break]:
    """The ways in which a link breaks, with other lengths whenever it happens."""
    rng = random.Random(5)

    async def stalled(link: Proxy) -> None:
        link.stall()
        await asyncio.sleep(rng.uniform(0, _LONGEST))
        link.flow()

    async def cut_in_a_stall(link: Proxy) -> None:
        link.stall()
        await asyncio.sleep(rng.uniform(0, _LONGEST))
        await link.cut()
        link.flow()

    async def cut_after_a_stall(link: Proxy) -> None:
        await stalled(link)
        await link.cut()

    async def down(link: Proxy) -> None:
        link.refuse(True)
        await link.cut()
        await asyncio.sleep(rng.uniform(0, _LONGEST))
        link.refuse(False)

    return {
        "cut": Proxy.cut,
        STALLED: stalled,
        "cut in a stall": cut_in_a_stall,
        "cut after a stall": cut_after_a_stall,
        "cut, and down for a while": down,
    }


async def _lose(
    what: str,
    client: AsyncClient,
    jobs: list[Job],
    losses: Sequence[Loss],
    times: int,
    *,
    resumes: bool = True,
) -> Lost:
    rng, hits = random.Random(4), list[Hit]()
    async with Streaming(client, jobs, SESSIONS) as load:
        for time, lose in zip(range(1, times + 1), itertools.cycle(losses), strict=False):
            await asyncio.sleep(rng.uniform(0.0, 0.3))
            hits += await load.hits(lose, resumes=resumes)
            if time % TELL == 0 or time == times:
                print(f"{what}: {time} of {times}, {load.tally}", flush=True)
    return what, times, hits, load.tally


def _row(what: str, times: int, hits: list[Hit], tally: Tally) -> str:
    seconds = sorted(hit.seconds for hit in hits)
    p99 = statistics.quantiles(seconds, n=100, method="inclusive")[98]
    figures = [what, times, len(hits), round(statistics.mean(hit.position for hit in hits))]
    figures += [
        f"{tally.tokens:,}",
        tally.lost,
        tally.repeated,
        tally.changed,
        tally.rows_changed,
        tally.resumes,
    ]
    figures += [f"{statistics.median(seconds):.3f}", f"{p99:.3f}", f"{seconds[-1]:.3f}"]
    return f"| {' | '.join(map(str, figures))} |"


def _jobs(monolith: Monolith) -> Iterator[Job]:
    """Half of them greedy."""
    rng, ids = random.Random(1), tokenizer().encode(held_out()).ids
    for number in range(JOBS):
        start = rng.randrange(len(ids) - PROMPTS[1])
        sampling = Sampling(
            rng.choice([0.7, 1.0]), rng.choice([0, 50]), rng.choice([1.0, 0.95]), rng.getrandbits(64)
        )
        prompt = ids[start : start + rng.randint(*PROMPTS)]
        yield Job.ask(monolith, prompt, sampling if number % 2 else Sampling(), TOKENS)


def _client(edge: str, bundle: Path) -> AsyncClient:
    return AsyncClient(edge, bundle=bundle, timeout=60, threads=1)


if __name__ == "__main__":
    main()
