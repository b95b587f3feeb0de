"""What is counted is what happened: steps and bytes, resumes by cause, refusals by reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client import Counter, Histogram

from tests.cloud.cores import opened
from tests.identities import HOST, enrolled
from tests.tiers import running_core, running_edge
from tests.wire import Peer
from trifold.cloud.authority.authority import Authority
from trifold.cloud.core.kv.blocks import BLOCK
from trifold.device import AsyncClient, Chunk
from trifold.shared.errors import InvalidRequest, TrifoldError
from trifold.shared.session.server import TierServer
from trifold.shared.telemetry import metrics

PROMPT = "one two three"


def value(metric: Counter | Histogram, *labels: str) -> float:
    """Of a counter; how often something was observed, of a histogram."""
    labelled = metric.labels(*labels) if labels else metric
    (found,) = (
        sample.value
        for family in labelled.collect()
        for sample in family.samples
        if sample.name.endswith(("_total", "_count"))
    )
    return found


@contextmanager
def grows(by: float, metric: Counter | Histogram, *labels: str) -> Iterator[None]:
    before = value(metric, *labels)
    yield
    assert value(metric, *labels) - before == by


async def complete(client: AsyncClient, tokens: int) -> list[Chunk]:
    return [chunk async for chunk in client.generate(PROMPT, max_tokens=tokens, eos=())]


async def test_an_answer_is_counted_at_the_device_and_its_steps_and_bytes_in_every_tier(bundle: Path) -> None:
    async with (
        running_core(bundle) as core,
        running_edge(bundle, core.address) as edge,
        AsyncClient(edge.address, bundle=bundle, threads=1) as client,
    ):
        length = len(client.tokenize(PROMPT))
        with (
            grows(1, metrics.TIME_TO_FIRST_TOKEN),
            grows(4, metrics.TIME_PER_OUTPUT_TOKEN),
            grows(1, metrics.REQUEST_LATENCY),
            grows(1, metrics.REQUESTS, "length"),
            grows(length, metrics.PROMPT_TOKENS),
            grows(5, metrics.GENERATION_TOKENS),
            grows(2 * length, metrics.POSITIONS, "prompt"),
            grows(2 * 4, metrics.POSITIONS, "token"),
            grows(2 * 4, metrics.STEP, "token"),
            grows(4, metrics.ROUND_TRIP, "device-edge"),
            grows(4, metrics.ROUND_TRIP, "edge-cloud"),
        ):
            up, down = (value(metrics.LINK_BYTES, "device-edge", way) for way in ("up", "down"))
            chunks = await complete(client, 5)
        links = [chunk.trace.links[0] for chunk in chunks if chunk.trace]
        # Besides the steps there are Open, Opened and Close.
        steps_up, steps_down = sum(link.bytes_up for link in links), sum(link.bytes_down for link in links)
        assert 0 < value(metrics.LINK_BYTES, "device-edge", "up") - up - steps_up < 200
        assert 0 < value(metrics.LINK_BYTES, "device-edge", "down") - down - steps_down < 500


async def test_positions_that_another_session_had_are_told_in_the_trace_and_not_counted(bundle: Path) -> None:
    async with (
        running_core(bundle, prefix_memory=64 * 1024**2) as core,
        running_edge(bundle, core.address) as edge,
        AsyncClient(edge.address, bundle=bundle, threads=1) as client,
    ):
        prompt = [3, *range(5, 25)] * 7
        first, second = [
            [chunk async for chunk in client.generate(prompt, max_tokens=3, eos=())] for _ in range(2)
        ]
        told = [[tier.reused for tier in chunk.trace.tiers] for chunk in first + second if chunk.trace]
        assert told == [*([[0, 0, 0]] * 3), [0, 0, 2 * BLOCK], *([[0, 0, 0]] * 2)]
        with grows(2 * len(prompt) - 2 * BLOCK, metrics.POSITIONS, "prompt"):
            _ = [chunk async for chunk in client.generate(prompt, max_tokens=1, eos=())]


async def test_generations_that_fail_or_are_given_up_are_counted_as_such(bundle: Path) -> None:
    async with running_core(bundle) as core, running_edge(bundle, core.address) as edge:
        async with AsyncClient(edge.address, bundle=bundle, threads=1) as client:
            with grows(2, metrics.REQUESTS, "cancelled"), grows(0, metrics.REQUESTS, "error"):
                generation = client.generate(PROMPT, max_tokens=50, eos=())
                await anext(generation)
                generation.cancel()
                assert (await anext(generation)).finish_reason == "cancelled"
                async with client.generate(PROMPT, max_tokens=50, eos=()) as left:
                    await anext(left)
        async with AsyncClient("127.0.0.1:9", bundle=bundle, threads=1, timeout=1) as client:
            with grows(1, metrics.REQUESTS, "error"), pytest.raises(TrifoldError):
                await complete(client, 5)


async def test_a_resume_is_counted_by_what_ended_the_stream_before(bundle: Path) -> None:
    async with running_core(bundle) as core, Peer.at(core.address, "CoreService") as peer:
        digest = core.service.digest

        held = await opened(core, peer, held=1)
        await held.hang_up()
        with grows(1, metrics.RESUMES, "UNAVAILABLE"):
            again = peer.call()
            await again.open(digest, session=held.session, epoch=2)
        with grows(1, metrics.RESUMES, "STALE_EPOCH"):
            await peer.call().open(digest, session=again.session, epoch=3)
        with grows(1, metrics.RESUMES, metrics.FORGOTTEN):
            await peer.call().open(digest, epoch=2, admitted=True)


async def test_refusals_are_counted_by_reason_also_those_at_the_door(bundle: Path, tmp_path: Path) -> None:
    authority = Authority.init(tmp_path / "authority", [HOST])
    core_node, edge_node, device_node = (
        enrolled(authority, tmp_path / role, role) for role in ("core", "edge", "device")
    )
    async with running_core(bundle, tls=core_node) as core:
        async with Peer.at(core.address, "CoreService", edge_node) as peer:
            with grows(1, metrics.REFUSALS, "INVALID_REQUEST"):
                talk = peer.call()
                await talk.say(b"rubbish")
                assert type(await talk.end()) is InvalidRequest
        async with Peer.at(core.address, "CoreService", device_node) as peer:
            with grows(1, metrics.REFUSALS, "FORBIDDEN"), pytest.raises(TrifoldError):
                await peer.call().open(core.service.digest)


async def test_readings_are_those_of_the_sessions_and_the_certificate(bundle: Path, tmp_path: Path) -> None:
    node = enrolled(Authority.init(tmp_path / "authority", [HOST]), tmp_path / "core", "core")
    async with running_core(bundle, streams=3) as core, Peer.at(core.address, "CoreService") as peer:
        server = TierServer(core.service)
        before = readings(server)
        assert before["trifold_num_requests_limit"] == 3
        assert before["trifold_num_requests_running"] == before["trifold_kv_cache_bytes"] == 0
        assert "trifold_certificate_expiry_timestamp_seconds" not in before
        talk = peer.call()
        await talk.open(core.service.digest)
        during = readings(server)
        assert during["trifold_num_requests_running"] == 1
        assert 0 < during["trifold_kv_cache_bytes"] < during["trifold_kv_cache_limit_bytes"]
        await talk.close()
    async with running_core(bundle, tls=node) as core:
        assert readings(core.server)["trifold_certificate_expiry_timestamp_seconds"] > 1.7e9


def readings(server: TierServer) -> dict[str, float]:
    return {sample.name: sample.value for family in server.readings() for sample in family.samples}
