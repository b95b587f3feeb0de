"""Sessions stream side by side while tiers are killed and links break: each token comes once, unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.network.proxy import Proxy
from tests.processes import Processes, Service
from tests.streaming import Job, Streaming, Tally
from trifold.device import AsyncClient, Chunk, Sampling
from trifold.shared.cli.service_process import ServiceProcess
from trifold.shared.runtime.monolith import Monolith

SESSIONS = 4
TOKENS = 60
LOSSES = 3


@pytest.fixture(scope="module")
def jobs(bundle: Path) -> list[Job]:
    monolith = Monolith.load(bundle, threads=1)
    samplings = [Sampling(), Sampling(temperature=1.0, seed=3), Sampling(temperature=0.8, top_k=40, seed=4)]
    prompts = [list(range(start, start + 20)) for start in range(1, 6)]
    return [Job.ask(monolith, prompt, sampling, TOKENS) for sampling in samplings for prompt in prompts]


@pytest.fixture(scope="module")
def tiers(bundle: Path) -> Iterator[Processes]:
    with Processes(bundle, "--threads", "1") as running:
        yield running


@pytest.mark.parametrize("service", ["cloud", "edge"])
async def test_a_tier_that_is_killed_under_load_costs_no_session_a_token(
    tiers: Processes, jobs: list[Job], service: Service
) -> None:
    async def kill() -> None:
        tiers.kill(service)
        await asyncio.to_thread(tiers.start, service)

    async with (
        AsyncClient(tiers.edge, bundle=tiers.bundle, timeout=60, threads=1) as client,
        Streaming(client, jobs, SESSIONS) as load,
    ):
        hits = [hit for _ in range(LOSSES) for hit in await load.hits(kill)]
    assert len(hits) == LOSSES * SESSIONS
    assert load.tally.tokens >= SESSIONS * TOKENS
    assert load.tally.resumes >= LOSSES * SESSIONS
    assert not load.tally.wrong, load.tally


async def test_links_that_are_cut_and_stall_under_load_cost_no_session_a_token(
    bundle: Path, jobs: list[Job]
) -> None:
    serve = [str(bundle), "--threads", "1", "--listen", "127.0.0.1:0"]
    with ServiceProcess(["cloud", "serve", *serve]) as core:
        async with Proxy(core.address) as inner:
            with ServiceProcess(["edge", "serve", *serve, "--core", inner.address]) as edge:
                async with (
                    Proxy(edge.address) as outer,
                    AsyncClient(outer.address, bundle=bundle, timeout=60, threads=1) as client,
                    Streaming(client, jobs, SESSIONS) as load,
                ):
                    for link in (outer, inner) * LOSSES:

                        async def cut_in_a_stall(link: Proxy = link) -> None:
                            link.stall()
                            await asyncio.sleep(0.05)
                            await link.cut()
                            link.flow()

                        async def stalled(link: Proxy = link) -> None:
                            link.stall()
                            await asyncio.sleep(0.05)
                            link.flow()

                        assert len(await load.hits(link.cut)) == SESSIONS
                        assert len(await load.hits(cut_in_a_stall)) == SESSIONS
                        assert len(await load.hits(stalled, resumes=False)) == SESSIONS
    assert load.tally.resumes >= 2 * 2 * LOSSES * SESSIONS
    assert not load.tally.wrong, load.tally


async def test_a_token_that_is_lost_repeated_or_changed_is_counted(tiers: Processes, jobs: list[Job]) -> None:
    job = jobs[0]
    async with AsyncClient(tiers.edge, bundle=tiers.bundle, threads=1) as client:
        chunks = [chunk async for chunk in client.generate(job.prompt, max_tokens=TOKENS, eos=())]

    def counted(chunks: list[Chunk]) -> tuple[int, int, int, int]:
        tally = Tally()
        tally.add(job, chunks)
        assert bool(tally.wrong) == (chunks is not honest)
        return tally.lost, tally.repeated, tally.changed, tally.rows_changed

    honest, first = chunks, chunks[0]
    assert first.trace
    another_row = replace(first, trace=replace(first.trace, row_digest="of another row"))
    assert counted(honest) == (0, 0, 0, 0)
    assert counted(chunks[1:]) == (1, 0, 0, 0)
    assert counted([*chunks[:5], *chunks[4:]]) == (0, 1, 0, 0)
    assert counted([replace(first, token_ids=(job.tokens[0].id + 1,)), *chunks[1:]]) == (0, 0, 1, 0)
    assert counted([another_row, *chunks[1:]]) == (0, 0, 0, 1)
