from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest

from tests.edge.houses import LENGTH, House, settled
from tests.tiers import engine, running_core, running_edge
from tests.wire import Peer, decoded
from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import (
    DigestMismatch,
    InvalidRequest,
    OutOfSequence,
    Overloaded,
    TrifoldError,
)


@pytest.fixture
async def house(bundle: Path) -> AsyncIterator[House]:
    async with House.up(bundle) as house:
        yield house


@pytest.mark.parametrize("chunks", [[LENGTH], [1] * LENGTH, [5, 1, 2, 32], [3, 36, 1]])
@pytest.mark.parametrize("which", ["bundle", "attending_bundle"])
async def test_rows_are_those_of_the_monolith_however_the_prompt_is_cut(
    which: str, chunks: Sequence[int], request: pytest.FixtureRequest
) -> None:
    async with House.up(request.getfixturevalue(which)) as house:
        tokens = house.tokens()
        talk = await house.opened()
        base_pos, got = 0, []
        for count in chunks:
            await talk.send_tokens(tokens[base_pos : base_pos + count], base_pos)
            got.append(decoded(house.codec, await talk.result()))
            base_pos += count
        assert np.array_equal(np.concatenate(got), house.expected(tokens))
        await talk.close()


async def test_devices_side_by_side_do_not_change_each_other(house: House) -> None:
    async def one(seed: int) -> None:
        tokens = house.tokens(seed)
        talk = await house.opened()
        got, base_pos = [], 0
        for count in np.random.default_rng(seed).multinomial(LENGTH - 8, [1 / 8] * 8) + 1:
            await talk.send_tokens(tokens[base_pos : base_pos + count], base_pos)
            got.append(decoded(house.codec, await talk.result()))
            base_pos += count
        assert np.array_equal(np.concatenate(got), house.expected(tokens))
        await talk.close()

    await asyncio.gather(*(one(seed) for seed in range(12)))
    assert (len(house.edge.service.table), len(house.core.service.table)) == (0, 0)


async def test_only_the_rows_whose_logits_are_needed_travel(house: House) -> None:
    talk = await house.opened()
    await talk.send_tokens(house.tokens(), 0, logits_from=LENGTH - 1)
    result = await talk.result()
    assert (result.header.base_pos, result.header.rows) == (LENGTH - 1, 1)
    assert len(result.rows) == house.codec.size(1, LENGTH - 1)
    assert np.array_equal(decoded(house.codec, result), house.expected(house.tokens())[-1:])
    await talk.close()


async def test_the_edge_computes_the_next_chunk_while_the_core_is_busy(house: House) -> None:
    talk = await house.opened()
    house.link.stall()
    for base_pos in range(0, LENGTH, 10):
        await talk.send_tokens(house.tokens()[base_pos : base_pos + 10], base_pos)
    [session] = house.edge.service.table._sessions.values()
    await settled(lambda: session.have == LENGTH)
    house.link.flow()
    got = [decoded(house.codec, await talk.result()) for _ in range(4)]
    assert np.array_equal(np.concatenate(got), house.expected(house.tokens()))
    await talk.close()


async def test_opened_and_describe_tell_of_all_tiers(house: House) -> None:
    talk = house.peer.call()
    opened = await talk.open(house.digest, sampling=pb.Sampling(temperature=0.5, seed=7))
    assert [tier.tier for tier in opened.tiers] == ["edge", "cloud"]
    assert (opened.have, opened.steps_in_flight, opened.max_rows) == (0, 4, 512)
    told = await house.peer.describe()
    assert [tier.tier for tier in told.tiers] == ["edge", "cloud"]
    assert (told.serving_digest, told.sessions) == (house.digest, 1)
    await talk.close()


async def test_a_trace_tells_of_both_tiers_and_of_the_bytes_between_them(house: House) -> None:
    talk = await house.opened(held=4)
    up, down = house.link.bytes_up, house.link.bytes_down
    await talk.send_tokens(house.tokens()[4:], 4)
    cloud, edge = (await talk.result()).hops
    assert (cloud.tier, edge.tier) == ("cloud", "edge")
    assert 0 < edge.compute_ns < edge.total_ns
    assert cloud.total_ns < edge.total_ns
    rows = house.codec.size(LENGTH - 4, 4)
    for told, measured in (
        (edge.bytes_up, house.link.bytes_up - up),
        (edge.bytes_down, house.link.bytes_down - down),
    ):
        # HTTP/2 adds its frames to what gRPC was given.
        assert rows < told < measured < told + 500
    await talk.close()


async def test_a_step_of_a_branch_that_was_given_up_keeps_its_place_among_the_answers(house: House) -> None:
    tokens = house.tokens()
    talk = await house.opened(held=10)
    await talk.send_tokens(tokens[10:12], 10, branch=1)
    await talk.send_tokens(house.tokens(seed=3)[12:14], 12)
    await talk.send_tokens(tokens[12:], 12, branch=1)
    first, stale, last = [await talk.result() for _ in range(3)]
    assert [result.header.seq for result in (first, stale, last)] == [1, 2, 3]
    assert (stale.stale, stale.header.rows, stale.rows) == (True, 0, b"")
    got = [decoded(house.codec, result) for result in (first, last)]
    assert np.array_equal(np.concatenate(got), house.expected(tokens)[10:])
    await talk.close()


@pytest.mark.parametrize(
    ("fields", "error", "hint"),
    [
        ({"tokens": [384]}, InvalidRequest, "beyond the vocabulary of 384"),
        ({"tokens": [1, 2]}, InvalidRequest, "2 token ids in a step of 1 rows"),
        ({"tokens": []}, InvalidRequest, "0 token ids in a step of 1 rows"),
        ({"codec": pb.CODEC_INT8}, InvalidRequest, "no codec"),
        ({"rows_data": b"\0" * 68}, InvalidRequest, "a step of rows where tokens are expected"),
        ({"seq": 0}, OutOfSequence, "step 0 came where step 1 was expected"),
    ],
)
async def test_a_step_that_cannot_be_is_refused_and_never_reaches_the_core(
    house: House, fields: dict[str, Any], error: type[TrifoldError], hint: str
) -> None:
    talk = await house.opened(held=4)
    [held] = house.core.service.table._sessions.values()
    payload = {} if "rows_data" in fields else {"tokens": [1]}
    await talk.say(talk.step(4, 1, **{**payload, **fields}))
    refusal = await talk.end()
    assert type(refusal) is error
    assert hint in refusal.message
    assert held.have == 4


@pytest.mark.parametrize(
    ("sampling", "hint"),
    [
        (pb.Sampling(temperature=-1), "temperature"),
        (pb.Sampling(temperature=float("nan")), "temperature"),
        (pb.Sampling(top_p=1.5), "top_p"),
    ],
)
async def test_sampling_parameters_are_checked_at_open(
    house: House, sampling: pb.Sampling, hint: str
) -> None:
    with pytest.raises(InvalidRequest, match=hint):
        await house.peer.call().open(house.digest, sampling=sampling)


async def test_an_adapter_that_is_not_there_is_refused(house: House) -> None:
    with pytest.raises(DigestMismatch, match="no promoted adapter"):
        await house.peer.call().open(house.digest, adapter_digest="ab" * 32)


async def test_tiers_of_different_bundles_do_not_work_together(bundle: Path, attending_bundle: Path) -> None:
    async with (
        running_core(attending_bundle) as core,
        running_edge(bundle, core.address) as edge,
        Peer.at(edge.address, "EdgeService") as peer,
    ):
        with pytest.raises(DigestMismatch, match="give all tiers the same bundle"):
            await peer.call().open(edge.service.frames.digest)
        assert len(edge.service.table) == 0


async def test_a_core_without_room_says_when_to_ask_again(bundle: Path) -> None:
    room = engine(bundle).cache_bytes(64)
    async with (
        running_core(bundle, memory=room) as core,
        running_edge(bundle, core.address) as edge,
        Peer.at(edge.address, "EdgeService") as peer,
    ):
        digest = edge.service.frames.digest
        first = peer.call()
        await first.open(digest)
        with pytest.raises(Overloaded) as refusal:
            await peer.call().open(digest)
        assert refusal.value.retry_after
        assert len(edge.service.table) == 1
        await first.close()


async def test_a_stalled_device_holds_up_no_other(house: House) -> None:
    async with Peer.at(house.edge.address, "EdgeService") as other:
        stalled = other.call()
        await stalled.open(house.digest, capacity=256)
        for _ in range(4):
            await stalled.send_tokens(np.zeros(256, np.int64), 0)
        talk = await house.opened()
        await house.rest(talk, 0)
        await talk.close()


@asynccontextmanager
async def strange_core(answer: pb.SessionResponse | bytes) -> AsyncIterator[str]:
    """The address of a core that opens properly and then answers every step with the same."""

    async def session(_: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        await context.read()
        opened = pb.Opened(steps_in_flight=4, max_rows=512, lease_ms=1)
        await context.write(pb.SessionResponse(opened=opened).SerializeToString())
        while (step := await context.read()) and isinstance(step, bytes):
            await context.write(answer if isinstance(answer, bytes) else answer.SerializeToString())

    server = grpc.aio.server()
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(session)
    handlers = grpc.method_handlers_generic_handler("trifold.proto.v1.CoreService", {"Session": handler})
    server.add_generic_rpc_handlers([handlers])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.mark.parametrize(
    "answer",
    [
        b"\xff\xff",
        pb.SessionResponse(),
        pb.SessionResponse(opened=pb.Opened()),
        pb.SessionResponse(result=pb.Result(header=pb.Header(seq=1, rows=1), rows=b"\0" * 128)),
        pb.SessionResponse(result=pb.Result(header=pb.Header(rows=2), rows=b"\0" * 256)),
        pb.SessionResponse(result=pb.Result(header=pb.Header(rows=1), rows=b"\0" * 127)),
        pb.SessionResponse(result=pb.Result(header=pb.Header(rows=1, base_pos=1), rows=b"\0" * 128)),
    ],
)
async def test_a_core_that_answers_nonsense_is_not_believed(
    bundle: Path, answer: pb.SessionResponse | bytes
) -> None:
    async with (
        strange_core(answer) as core,
        running_edge(bundle, core) as edge,
        Peer.at(edge.address, "EdgeService") as peer,
    ):
        talk = peer.call()
        await talk.open(edge.service.frames.digest)
        await talk.send_tokens([1], 0)
        error = await talk.end()
        assert type(error) is TrifoldError
        assert "is it of the same version" in error.message
