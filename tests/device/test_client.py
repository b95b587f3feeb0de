from __future__ import annotations

import asyncio
import gc
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.network.proxy import Proxy
from tests.processes import Processes
from tests.tiers import RunningEdge, running_core, running_edge, shard
from trifold.cloud.split.split import split
from trifold.device import AsyncClient, Client, Message, errors
from trifold.device.client.generation import Generation
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import Cuts
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.runtime.monolith import Monolith
from trifold.shared.runtime.sampling import Sampling

PROMPT = [10, 20, 30, 40, 50]

NOBODY = "127.0.0.1:1"
"""Where nothing listens."""


@pytest.fixture
async def edge(bundle: Path) -> AsyncIterator[RunningEdge]:
    async with running_core(bundle) as core, running_edge(bundle, core.address) as edge:
        yield edge


@pytest.fixture
async def client(edge: RunningEdge, bundle: Path) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(edge.address, bundle=bundle) as client:
        yield client


async def freed(edge: RunningEdge) -> bool:
    """Whether the edge holds no session, now or in the next moment."""
    for _ in range(100):
        if not len(edge.service.table):
            return True
        await asyncio.sleep(0.02)
    return False


async def _cancel(generation: Generation) -> None:
    generation.cancel()


async def _cancel_and_read_on(generation: Generation) -> None:
    generation.cancel()
    chunks = [chunk async for chunk in generation]
    assert [chunk.finish_reason for chunk in chunks] == ["cancelled"]


async def _cancel_while_waiting(generation: Generation) -> None:
    waiting = asyncio.ensure_future(anext(generation))
    await asyncio.sleep(0)
    generation.cancel()
    chunks = [await waiting, *[chunk async for chunk in generation]]
    assert chunks[-1].finish_reason == "cancelled"


async def _cancel_the_task(generation: Generation) -> None:
    waiting = asyncio.ensure_future(anext(generation))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})


async def _close(generation: Generation) -> None:
    await generation.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(generation)


async def _leave(generation: Generation) -> None:
    async with generation:
        async for _ in generation:
            break


async def _read_to_the_end(generation: Generation) -> None:
    chunks = [chunk async for chunk in generation]
    assert chunks[-1].finish_reason == "length"


@pytest.mark.parametrize(
    "end",
    [_cancel, _cancel_and_read_on, _cancel_while_waiting, _cancel_the_task, _close, _leave, _read_to_the_end],
)
async def test_however_a_generation_ends_its_memory_is_freed_in_both_tiers(
    edge: RunningEdge, client: AsyncClient, end: Callable[[Generation], Awaitable[None]]
) -> None:
    generation = client.generate(PROMPT, max_tokens=100, eos=())
    await anext(generation)
    assert len(edge.service.table) == 1
    await end(generation)
    assert await freed(edge)
    assert (await client.describe()).kv_bytes == 0


async def test_a_forgotten_generation_is_closed_when_it_is_collected(
    edge: RunningEdge, client: AsyncClient
) -> None:
    async for _ in client.generate(PROMPT, max_tokens=100, eos=()):
        break
    gc.collect()
    assert await freed(edge)


async def test_closing_the_client_closes_its_generations(edge: RunningEdge, bundle: Path) -> None:
    async with AsyncClient(edge.address, bundle=bundle) as client:
        generations = [client.generate(PROMPT, max_tokens=100, eos=()) for _ in range(3)]
        for generation in generations:
            await anext(generation)
        assert len(edge.service.table) == 3
    assert await freed(edge)


async def test_a_generation_that_was_cancelled_before_it_began_never_reaches_the_edge(
    edge: RunningEdge, client: AsyncClient
) -> None:
    generation = client.generate(PROMPT, max_tokens=100)
    generation.cancel()
    assert [chunk.finish_reason async for chunk in generation] == ["cancelled"]
    assert edge.service.table._served == 0


async def test_a_cancelled_generation_can_be_resumed_from_its_journal(
    client: AsyncClient, bundle: Path, tmp_path: Path
) -> None:
    tokens = [token.id for token in Monolith.load(bundle).generate(PROMPT, Sampling(1.0), 40, eos=())]
    journal = tmp_path / "journal"
    generation = client.generate(PROMPT, max_tokens=40, temperature=1.0, eos=(), journal=journal)
    async for chunk in generation:
        if chunk.trace and chunk.trace.position == len(PROMPT) + 20:
            generation.cancel()
    resumed = [token async for chunk in client.resume(journal) for token in chunk.token_ids]
    assert resumed == tokens


async def test_stop_strings_eos_tokens_and_length_end_a_generation(client: AsyncClient) -> None:
    free = [chunk async for chunk in client.generate(PROMPT, max_tokens=60, temperature=1.0, eos=())]
    assert (len(free), free[-1].finish_reason) == (60, "length")
    ids = [token for chunk in free for token in chunk.token_ids]
    eos = ids[30]
    ended = [chunk async for chunk in client.generate(PROMPT, max_tokens=60, temperature=1.0, eos=[eos])]
    assert [token for chunk in ended for token in chunk.token_ids] == ids[: ids.index(eos) + 1]
    assert ended[-1].finish_reason == "stop"
    text = "".join(chunk.text for chunk in free)
    stop = text[len(text) // 2 :][:5]
    stopped = [
        chunk async for chunk in client.generate(PROMPT, max_tokens=60, temperature=1.0, eos=(), stop=stop)
    ]
    assert "".join(chunk.text for chunk in stopped) == text[: text.index(stop)]
    assert stopped[-1].finish_reason == "stop"


async def test_telling_probabilities_changes_no_token(client: AsyncClient, bundle: Path) -> None:
    tokens = [token.id for token in Monolith.load(bundle).generate(PROMPT, Sampling(1.0), 20, eos=())]
    chunks = [
        chunk async for chunk in client.generate(PROMPT, max_tokens=20, temperature=1.0, eos=(), logprobs=3)
    ]
    assert [chunk.token_ids[0] for chunk in chunks] == tokens
    for chunk in chunks:
        assert chunk.logprobs
        told = dict(chunk.logprobs.top)
        assert len(told) == 3
        assert told.get(chunk.token_ids[0], chunk.logprobs.token) == chunk.logprobs.token < 0
    ended = [chunk async for chunk in client.generate(PROMPT, eos=tokens[:1], temperature=1.0, logprobs=0)]
    assert [chunk.logprobs for chunk in ended] == [None]  # the token that ends the text is no part of it
    with pytest.raises(errors.InvalidRequest, match="logprobs is -1"):
        client.generate(PROMPT, logprobs=-1)


async def test_what_cannot_work_is_refused_before_anything_is_sent(bundle: Path, tmp_path: Path) -> None:
    async with AsyncClient(NOBODY, bundle=bundle) as client:
        with pytest.raises(errors.PromptTooLong, match=r"250 tokens and max_tokens 10 .* 256 positions"):
            client.generate([1] * 250, max_tokens=10)
        with pytest.raises(errors.InvalidRequest, match="prompt is empty"):
            client.generate("")
        with pytest.raises(errors.InvalidRequest, match="token 384 of the prompt"):
            client.generate([1, 384])
        with pytest.raises(errors.InvalidRequest, match="max_tokens is 0"):
            client.generate(PROMPT, max_tokens=0)
        with pytest.raises(errors.InvalidRequest, match="temperature is -1"):
            client.generate(PROMPT, temperature=-1)
        for parameter in ("max_tokens", "temperature", "top_k", "top_p", "seed"):
            with pytest.raises(errors.InvalidRequest, match=f"{parameter} is 'hot': it must be a "):
                client.generate(PROMPT, **{parameter: "hot"})  # type: ignore[arg-type]
        with pytest.raises(errors.InvalidRequest, match="stop string is empty"):
            client.generate(PROMPT, stop=["x", ""])
        (tmp_path / "taken").touch()
        with pytest.raises(errors.InvalidRequest, match="taken exists"):
            client.generate(PROMPT, journal=tmp_path / "taken")


async def test_an_edge_that_is_not_there_fails_at_once_and_is_asked_for_by_address(bundle: Path) -> None:
    async with AsyncClient(NOBODY, bundle=bundle, timeout=60) as client:
        began = time.monotonic()
        with pytest.raises(errors.Unavailable, match=f"edge at {NOBODY}.*trifold edge serve"):
            await anext(client.generate(PROMPT))
        with pytest.raises(errors.Unavailable, match=NOBODY):
            await client.describe()
    assert time.monotonic() - began < 30


async def test_a_core_in_place_of_an_edge_is_called_what_it_is(bundle: Path) -> None:
    async with running_core(bundle) as core, AsyncClient(core.address, bundle=bundle) as client:
        with pytest.raises(errors.ConfigError, match=f"{core.address}.*: a Trifold cloud.* not an edge"):
            await anext(client.generate(PROMPT))
        with pytest.raises(errors.ConfigError, match="not an edge"):
            await client.describe()


async def test_a_loss_is_logged_once_and_so_is_its_end(
    edge: RunningEdge, bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "trifold.device")
    async with Proxy(edge.address) as proxy, AsyncClient(proxy.address, bundle=bundle) as client:
        generation = client.generate(PROMPT, max_tokens=20, eos=())
        await anext(generation)
        await proxy.cut()
        assert [chunk async for chunk in generation][-1].finish_reason == "length"
    lost, resumed = [record for record in caplog.records if record.name == "trifold.device.client.link"]
    assert (lost.levelname, resumed.levelname) == ("WARNING", "INFO")
    assert lost.getMessage().startswith(f"lost the edge at {proxy.address}: trying for 30 s")
    assert resumed.getMessage().startswith("resumed after ")


async def test_a_closed_client_says_so(bundle: Path, tmp_path: Path) -> None:
    async with AsyncClient(NOBODY, bundle=bundle) as client:
        pass
    with pytest.raises(errors.InvalidRequest, match="the client is closed"):
        client.generate(PROMPT)
    with pytest.raises(errors.InvalidRequest, match="the client is closed"):
        client.resume(tmp_path / "journal")
    with pytest.raises(errors.InvalidRequest, match="the client is closed"):
        await client.describe()
    await client.aclose()


def test_a_closed_client_without_an_event_loop_says_so(bundle: Path) -> None:
    with Client(NOBODY, bundle=bundle) as client:
        generation = client.generate(PROMPT)
    uses: list[Callable[[], object]] = [
        lambda: client.generate(PROMPT),
        lambda: next(generation),
        client.describe,
    ]
    for use in uses:
        with pytest.raises(errors.InvalidRequest, match="the client is closed"):
            use()
    generation.cancel()
    generation.close()
    client.close()


async def test_a_core_that_is_not_there_is_named(bundle: Path) -> None:
    async with running_edge(bundle, NOBODY) as edge, AsyncClient(edge.address, bundle=bundle) as client:
        with pytest.raises(errors.Unavailable, match=f"core at {NOBODY}"):
            await anext(client.generate(PROMPT))


async def test_an_edge_that_is_silent_is_named_when_the_deadline_is_over(
    edge: RunningEdge, bundle: Path
) -> None:
    async with (
        Proxy(edge.address) as proxy,
        AsyncClient(proxy.address, bundle=bundle, timeout=0.5) as client,
    ):
        generation = client.generate(PROMPT, max_tokens=100, eos=())
        await anext(generation)
        proxy.stall()
        with pytest.raises(errors.DeadlineExceeded, match=f"edge at {proxy.address} gave no answer"):
            await anext(generation)
        with pytest.raises(errors.DeadlineExceeded):
            await anext(client.generate(PROMPT))


async def test_another_bundle_at_the_edge_is_refused_with_both_digests(
    edge: RunningEdge, bundle: Path, attending_bundle: Path
) -> None:
    digests = [TierFolder.open(path, "device").manifest.serving_digest for path in (bundle, attending_bundle)]
    async with AsyncClient(edge.address, bundle=attending_bundle) as client:
        with pytest.raises(errors.DigestMismatch, match=f"{digests[0][:12]}.*{digests[1][:12]}"):
            await anext(client.generate(PROMPT))


async def test_a_journal_of_another_bundle_is_refused_with_both_digests(
    client: AsyncClient, edge: RunningEdge, attending_bundle: Path, tmp_path: Path
) -> None:
    journal = str(tmp_path / "journal")
    async with client.generate(PROMPT, journal=journal) as generation:
        await anext(generation)
    async with AsyncClient(edge.address, bundle=attending_bundle) as other:
        with pytest.raises(errors.DigestMismatch, match="journal"):
            other.resume(journal)
    assert [chunk async for chunk in client.resume(journal)]


async def test_a_full_edge_says_when_to_come_back(bundle: Path) -> None:
    room = shard(bundle, "edge").cache_bytes(105)
    async with (
        running_core(bundle) as core,
        running_edge(bundle, core.address, memory=room) as edge,
        AsyncClient(edge.address, bundle=bundle) as client,
    ):
        first = client.generate(PROMPT, max_tokens=100, eos=())
        await anext(first)
        with pytest.raises(errors.Overloaded) as refusal:
            await anext(client.generate(PROMPT, max_tokens=100))
        assert refusal.value.retry_after
        await first.aclose()
        assert await anext(client.generate(PROMPT, max_tokens=100))


async def test_who_was_refused_is_refused_again_when_it_comes_with_its_journal(
    bundle: Path, tmp_path: Path
) -> None:
    async with (
        running_core(bundle) as core,
        running_edge(bundle, core.address, streams=1) as edge,
        AsyncClient(edge.address, bundle=bundle, threads=1) as client,
    ):
        first = client.generate(PROMPT, max_tokens=100, eos=())
        await anext(first)
        journal = tmp_path / "journal"
        with pytest.raises(errors.Overloaded):
            await anext(client.generate(PROMPT, max_tokens=100, journal=journal))
        with pytest.raises(errors.Overloaded):
            await anext(client.resume(journal))
        await first.aclose()
        assert await anext(client.resume(journal))


async def test_a_chat_template_in_a_file_of_its_own_counts(checkpoint: Path, tmp_path: Path) -> None:
    messages = [Message(role="user", content="Hi")]
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("Q: {{ messages[0].content }} A:")
    split(Checkpoint.open(tmp_path / "model"), Cuts(edge=1, cloud=4), tmp_path / "bundle")
    async with AsyncClient(NOBODY, bundle=tmp_path / "bundle") as client:
        assert client._tokenizer.decode(client.chat_prompt(messages)) == "Q: Hi A:"


async def test_a_model_that_cannot_chat_says_so(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    split(Checkpoint.open(tmp_path / "model"), Cuts(edge=1, cloud=4), tmp_path / "bundle")
    async with AsyncClient(NOBODY, bundle=tmp_path / "bundle") as client:
        with pytest.raises(errors.UnsupportedModel, match="no chat template"):
            client.chat_prompt([Message(role="user", content="Hi")])


@pytest.mark.parametrize("name", ["model.onnx", "weights.bin", "tokenizer.json"])
def test_a_flipped_bit_in_the_device_part_is_refused_by_file_name(
    bundle: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(bundle / "device", tmp_path / "device")
    damaged = tmp_path / "device" / name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(errors.DamagedFile, match=name):
        Client(bundle=tmp_path)


def test_the_client_without_an_event_loop_gives_the_same_chunks_in_any_thread(bundle: Path) -> None:
    tokens = [token.id for token in Monolith.load(bundle).generate(PROMPT, Sampling(1.0), 40, eos=())]
    with Processes(bundle) as tiers, Client(tiers.edge, bundle=bundle) as client:

        def complete(_: int) -> list[int]:
            running = client.generate(PROMPT, max_tokens=40, temperature=1.0, eos=())
            return [token for chunk in running for token in chunk.token_ids]

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(complete, range(4))) == [tokens] * 4

        with client.generate(PROMPT, max_tokens=200, eos=()) as generation:
            next(generation)
            generation.cancel()
            assert [chunk.finish_reason for chunk in generation][-1] == "cancelled"

        forgotten = client.generate(PROMPT, max_tokens=200, eos=())
        next(forgotten)
        assert client.describe().sessions == 1
        del forgotten
        gc.collect()
        for _ in range(100):
            if not client.describe().sessions:
                break
            time.sleep(0.02)
        assert client.describe().kv_bytes == 0
        with pytest.raises(errors.PromptTooLong):
            client.generate([1] * 300)
