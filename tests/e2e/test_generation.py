"""The main job over sockets and processes: the split gives the tokens of the monolith, come what may."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.network.proxy import Proxy
from tests.processes import Processes, Service
from trifold.device import AsyncClient, Chunk, Sampling
from trifold.device.client.generation import Generation
from trifold.shared.errors import StaleEpoch, Unavailable
from trifold.shared.runtime.monolith import Monolith, Token

PROMPT = [int(byte) for byte in b"Three tiers, one model: what could go wrong?"]
TOKENS = 60
NO_EOS = ()

CASES = {
    "greedy": Sampling(),
    "seeded": Sampling(temperature=1.0, seed=7),
    "warped": Sampling(temperature=0.8, top_k=40, top_p=0.9, seed=2**63 + 1),
}


@pytest.fixture(scope="module", params=["bundle", "attending_bundle"])
def tiers(request: pytest.FixtureRequest) -> Iterator[Processes]:
    with Processes(request.getfixturevalue(request.param), "--grace", "0.2") as running:
        yield running


@pytest.fixture(scope="module")
def monolith(tiers: Processes) -> Monolith:
    return Monolith.load(tiers.bundle)


@pytest.fixture
async def client(tiers: Processes) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(tiers.edge, bundle=tiers.bundle) as client:
        yield client


def expected(monolith: Monolith, prompt: list[int], sampling: Sampling, tokens: int = TOKENS) -> list[Token]:
    return list(monolith.generate(prompt, sampling, tokens, eos=NO_EOS))


def begin(
    client: AsyncClient, prompt: list[int], sampling: Sampling, journal: Path | None = None
) -> Generation:
    return client.generate(
        prompt,
        max_tokens=TOKENS,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        eos=NO_EOS,
        journal=journal,
    )


def check(chunks: list[Chunk], tokens: list[Token]) -> None:
    """Same tokens and, where they were computed in this run, the same rows at the same positions."""
    assert [token for chunk in chunks for token in chunk.token_ids] == [token.id for token in tokens]
    computed = [chunk.trace for chunk in chunks if chunk.trace]
    by_position = {token.position: token.row_digest for token in tokens}
    assert computed
    assert all(trace.row_digest == by_position[trace.position] for trace in computed)
    assert chunks[-1].finish_reason == "length"


async def sessions_left(client: AsyncClient) -> tuple[int, int]:
    description = await client.describe()
    return description.sessions, description.kv_bytes


@pytest.mark.parametrize("case", CASES)
async def test_the_split_gives_the_tokens_the_rows_and_the_text_of_the_monolith(
    client: AsyncClient, monolith: Monolith, tiers: Processes, case: str
) -> None:
    tokens = expected(monolith, PROMPT, CASES[case])
    chunks = [chunk async for chunk in begin(client, PROMPT, CASES[case])]
    check(chunks, tokens)
    tokenizer = Tokenizer.from_file(str(tiers.bundle / "device" / "tokenizer.json"))
    text = tokenizer.decode([*PROMPT, *(token.id for token in tokens)], skip_special_tokens=True)
    shown = tokenizer.decode(PROMPT) + "".join(chunk.text for chunk in chunks)
    assert shown == text.rstrip("\ufffd")
    assert len({token.row_digest for token in tokens}) > TOKENS / 2


async def test_concurrent_generations_do_not_touch_each_other(
    client: AsyncClient, monolith: Monolith
) -> None:
    prompts = [PROMPT[:length] for length in (1, 3, 4, 5, 17, len(PROMPT))]
    samplings = [Sampling(temperature=1.0, seed=seed) for seed in range(len(prompts))]

    async def complete(prompt: list[int], sampling: Sampling) -> list[Chunk]:
        return [chunk async for chunk in begin(client, prompt, sampling)]

    results = await asyncio.gather(*map(complete, prompts, samplings))
    for prompt, sampling, chunks in zip(prompts, samplings, results, strict=True):
        check(chunks, expected(monolith, prompt, sampling))
    assert await sessions_left(client) == (0, 0)


@pytest.mark.parametrize("chunk", [1, 3, 16])
async def test_the_chunks_of_a_prompt_do_not_change_a_token(
    tiers: Processes, monolith: Monolith, chunk: int
) -> None:
    async with AsyncClient(tiers.edge, bundle=tiers.bundle, chunk=chunk) as client:
        chunks = [piece async for piece in begin(client, PROMPT, CASES["seeded"])]
    check(chunks, expected(monolith, PROMPT, CASES["seeded"]))
    assert chunks[0].trace
    assert chunks[0].trace.steps == -(-len(PROMPT) // chunk)


@pytest.mark.parametrize("service", ["cloud", "edge"])
async def test_a_killed_tier_that_comes_back_costs_no_token_and_repeats_none(
    client: AsyncClient, monolith: Monolith, tiers: Processes, service: Service
) -> None:
    chunks = []
    async for chunk in begin(client, PROMPT, CASES["seeded"]):
        chunks.append(chunk)
        if len(chunks) in (1, 20, 45):
            tiers.kill(service)
            back = asyncio.create_task(asyncio.to_thread(tiers.start, service))
        elif len(chunks) in (2, 21, 46):
            await back
    check(chunks, expected(monolith, PROMPT, CASES["seeded"]))
    traces = [chunk.trace for chunk in chunks if chunk.trace]
    resumed = [number for number, trace in enumerate(traces) if trace.resumed]
    # The answer to one more step may have been there before the kill.
    assert all(late in (0, 1) for late in map(int.__sub__, resumed, (1, 20, 45)))
    assert len(resumed) == 3
    assert not any(trace.changed for trace in traces)


async def test_both_tiers_killed_while_a_prompt_is_on_its_way_are_waited_for(
    tiers: Processes, monolith: Monolith, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    async with AsyncClient(tiers.edge, bundle=tiers.bundle, chunk=1) as client:
        generation = begin(client, PROMPT, CASES["greedy"], journal)
        first = asyncio.ensure_future(anext(generation))
        while b"fingerprints" not in journal.read_bytes():  # comes when the edge has answered Open
            await client.describe()
        tiers.kill("edge")
        tiers.kill("cloud")
        await asyncio.to_thread(tiers.start, "cloud")
        await asyncio.to_thread(tiers.start, "edge")
        chunks = [await first, *[chunk async for chunk in generation]]
    check(chunks, expected(monolith, PROMPT, CASES["greedy"]))


@pytest.mark.parametrize("service", ["cloud", "edge"])
async def test_a_tier_that_is_stopped_for_an_update_hands_its_sessions_over(
    client: AsyncClient, monolith: Monolith, tiers: Processes, service: Service
) -> None:
    chunks = []
    async for chunk in begin(client, PROMPT, CASES["warped"]):
        chunks.append(chunk)
        if len(chunks) == 10:
            assert await asyncio.to_thread(tiers.stop, service) == 0
            await asyncio.to_thread(tiers.start, service)
    check(chunks, expected(monolith, PROMPT, CASES["warped"]))


async def test_connections_that_are_cut_again_and_again_cost_no_token(
    tiers: Processes, monolith: Monolith
) -> None:
    async with Proxy(tiers.edge) as proxy, AsyncClient(proxy.address, bundle=tiers.bundle) as client:
        chunks = []
        async for chunk in begin(client, PROMPT, CASES["seeded"]):
            chunks.append(chunk)
            if len(chunks) % 7 == 0:
                await proxy.cut()
    check(chunks, expected(monolith, PROMPT, CASES["seeded"]))
    assert sum(chunk.trace.resumed for chunk in chunks if chunk.trace) == 8


async def test_only_what_was_lost_is_computed_again(tiers: Processes) -> None:
    """After a cut all tiers still hold the session, so one position is sent; a new process needs them all."""
    async with Proxy(tiers.edge) as proxy, AsyncClient(proxy.address, bundle=tiers.bundle) as client:
        rows = {}
        async for chunk in begin(client, PROMPT, CASES["seeded"]):
            assert chunk.trace
            rows[chunk.trace.position] = chunk.trace.rows
            if chunk.trace.position == len(PROMPT) + 4:
                await proxy.cut()
            if chunk.trace.position == len(PROMPT) + 8:
                await asyncio.to_thread(tiers.kill, "cloud")
                await asyncio.to_thread(tiers.start, "cloud")
    assert rows.pop(len(PROMPT)) == len(PROMPT)
    (again,) = [position for position, count in rows.items() if count > 1]
    # The answer to one more step may have been there before the kill.
    assert again - len(PROMPT) in (9, 10)
    assert rows[again] == again


async def test_a_device_that_was_killed_goes_on_from_its_journal(
    tiers: Processes, client: AsyncClient, monolith: Monolith, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    device = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DEVICE, tiers.edge, tiers.bundle, journal, stdout=asyncio.subprocess.PIPE
    )
    assert device.stdout
    shown = [int(await device.stdout.readline()) for _ in range(20)]
    device.kill()
    shown += [int(line) for line in (await device.stdout.read()).splitlines()]
    await device.wait()

    tokens = expected(monolith, PROMPT, CASES["seeded"])
    chunks = [chunk async for chunk in client.resume(journal)]
    check(chunks, tokens)
    assert chunks[0].replayed
    assert len(chunks[0].token_ids) >= len(shown)
    assert shown == [token.id for token in tokens[: len(shown)]]
    assert chunks[1].trace
    assert chunks[1].trace.resumed

    again = [chunk async for chunk in client.resume(journal)]
    assert len(again) == 1
    assert again[0].text == "".join(chunk.text for chunk in chunks)
    assert (again[0].replayed, again[0].finish_reason) == (True, "length")


DEVICE = f"""
import sys
from pathlib import Path
from trifold.device import Client

edge, bundle, journal = sys.argv[1:]
with Client(edge, bundle=bundle) as client:
    for chunk in client.generate(
        {PROMPT}, max_tokens={TOKENS}, temperature=1.0, seed=7, eos=(), journal=Path(journal)
    ):
        print(chunk.token_ids[0], flush=True)
"""


async def test_of_two_holders_of_a_journal_the_later_one_wins_and_the_other_is_told(
    tiers: Processes, client: AsyncClient, monolith: Monolith, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    first = begin(client, PROMPT, CASES["seeded"], journal)
    for _ in range(10):
        await anext(first)
    copy = tmp_path / "copy"
    copy.write_bytes(journal.read_bytes())
    check([chunk async for chunk in client.resume(copy)], expected(monolith, PROMPT, CASES["seeded"]))
    with pytest.raises(StaleEpoch, match="taken over"):
        [chunk async for chunk in first]


async def test_a_tier_that_stays_away_is_given_up_after_the_timeout(bundle: Path) -> None:
    with Processes(bundle) as tiers:
        async with AsyncClient(tiers.edge, bundle=bundle, timeout=1.0) as client:
            generation = begin(client, PROMPT, CASES["greedy"])
            await anext(generation)
            tiers.kill("edge")
            with pytest.raises(Unavailable, match=f"gave up after .*the edge at {tiers.edge}"):
                await anext(generation)
