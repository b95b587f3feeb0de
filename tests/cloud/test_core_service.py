from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.tiers import RunningCore, running_core, shard
from tests.wire import Peer, Talk, decoded
from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import (
    BadRows,
    ConfigError,
    DeadlineExceeded,
    DigestMismatch,
    InvalidRequest,
    MessageTooLarge,
    OutOfSequence,
    Overloaded,
    PromptTooLong,
    StaleEpoch,
    TrifoldError,
    Unavailable,
    UnknownSession,
)
from trifold.shared.runtime.codec import RowCodec, Rows
from trifold.shared.runtime.shard import Cache
from trifold.shared.session import stream as stream_module
from trifold.shared.session.channel import connect

LENGTH = 24


@pytest.fixture
async def core(bundle: Path) -> AsyncIterator[RunningCore]:
    async with running_core(bundle) as core:
        yield core


@pytest.fixture
async def peer(core: RunningCore) -> AsyncIterator[Peer]:
    async with Peer.at(core.address, "CoreService") as peer:
        yield peer


def codec_of(core: RunningCore) -> RowCodec:
    return core.service.frames.codec


def digest_of(core: RunningCore) -> str:
    return core.service.frames.digest


def some_rows(core: RunningCore, seed: int = 0, length: int = LENGTH) -> Rows:
    return np.random.default_rng(seed).standard_normal((length, codec_of(core).hidden), np.float32)


def expected(core: RunningCore, rows: Rows) -> Rows:
    """What a device must get for the rows of an edge, by the shard itself and in one piece."""
    codec, own = codec_of(core), core.service.shard
    arrived = codec.decode(codec.encode(rows, 0), len(rows), 0)
    out = own.run(own.cache(len(rows)), arrived, 0)
    return codec.decode(codec.encode(out, 0), len(rows), 0)


async def settled(condition: Callable[[], bool]) -> None:
    """Waits until the service has noticed."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - the service has no event for a test
            await asyncio.sleep(0.005)


async def opened(core: RunningCore, peer: Peer, held: int = 0, **fields: Any) -> Talk:
    """A stream whose session holds so many positions."""
    talk = peer.call()
    await talk.open(digest_of(core), **fields)
    if held:
        await talk.send_rows(codec_of(core), some_rows(core)[:held], 0)
        await talk.result()
    return talk


@pytest.mark.parametrize("chunks", [[LENGTH], [1] * LENGTH, [5, 1, 2, 16], [3, 20, 1]])
async def test_rows_are_those_of_the_shard_however_they_are_cut(
    core: RunningCore, peer: Peer, chunks: list[int]
) -> None:
    rows, codec = some_rows(core), codec_of(core)
    talk = await opened(core, peer)
    base_pos, got = 0, []
    for count in chunks:
        await talk.send_rows(codec, rows[base_pos : base_pos + count], base_pos)
        got.append(decoded(codec, await talk.result()))
        base_pos += count
    assert np.array_equal(np.concatenate(got), expected(core, rows))
    await talk.close()


async def test_a_device_without_attention_gets_only_the_rows_it_needs(core: RunningCore, peer: Peer) -> None:
    rows, codec = some_rows(core), codec_of(core)
    talk = await opened(core, peer)
    await talk.send_rows(codec, rows[:10], 0, logits_from=10)
    result = await talk.result()
    assert (result.header.rows, result.header.base_pos, result.rows) == (0, 10, b"")
    await talk.send_rows(codec, rows[10:], 10, logits_from=LENGTH - 1)
    result = await talk.result()
    assert (result.header.rows, result.header.base_pos) == (1, LENGTH - 1)
    assert np.array_equal(decoded(codec, result), expected(core, rows)[-1:])
    await talk.close()


async def test_a_device_with_attention_gets_every_row(attending_bundle: Path) -> None:
    async with running_core(attending_bundle) as core, Peer.at(core.address, "CoreService") as peer:
        rows, codec = some_rows(core), codec_of(core)
        talk = await opened(core, peer)
        await talk.send_rows(codec, rows, 0, logits_from=LENGTH)
        result = await talk.result()
        assert (result.header.rows, result.header.base_pos) == (LENGTH, 0)
        assert np.array_equal(decoded(codec, result), expected(core, rows))
        await talk.close()


async def test_sessions_side_by_side_do_not_change_each_other(core: RunningCore, peer: Peer) -> None:
    codec = codec_of(core)

    async def one(seed: int) -> None:
        rows = some_rows(core, seed)
        talk = await opened(core, peer)
        got, base_pos = [], 0
        for count in np.random.default_rng(seed).multinomial(LENGTH - 8, [1 / 8] * 8) + 1:
            await talk.send_rows(codec, rows[base_pos : base_pos + count], base_pos)
            got.append(decoded(codec, await talk.result()))
            base_pos += count
        assert np.array_equal(np.concatenate(got), expected(core, rows))
        await talk.close()

    await asyncio.gather(*(one(seed) for seed in range(12)))
    assert len(core.service.table) == 0


async def test_steps_may_be_in_flight_and_are_answered_in_order(core: RunningCore, peer: Peer) -> None:
    rows, codec = some_rows(core), codec_of(core)
    talk = await opened(core, peer)
    for base_pos in range(4):
        await talk.send_rows(codec, rows[base_pos : base_pos + 1], base_pos)
    results = [await talk.result() for _ in range(4)]
    assert [result.header.seq for result in results] == [0, 1, 2, 3]
    got = np.concatenate([decoded(codec, result) for result in results])
    assert np.array_equal(got, expected(core, rows[:4]))
    await talk.close()


async def test_a_caller_that_has_said_all_still_gets_its_answers(core: RunningCore, peer: Peer) -> None:
    talk = await opened(core, peer)
    for base_pos in range(3):
        await talk.send_rows(codec_of(core), some_rows(core)[base_pos : base_pos + 1], base_pos)
    await talk.finish()
    assert [(await talk.result()).header.seq for _ in range(3)] == [0, 1, 2]
    assert await talk.end() is None


async def test_a_trace_says_where_the_time_went(core: RunningCore, peer: Peer) -> None:
    talk = await opened(core, peer)
    await talk.send_rows(codec_of(core), some_rows(core)[:1], 0)
    [hop] = (await talk.result()).hops
    assert (hop.tier, hop.provider) == ("cloud", "CPUExecutionProvider")
    assert 0 < hop.compute_ns < hop.total_ns
    assert hop.queue_ns + hop.compute_ns <= hop.total_ns
    assert (hop.bytes_up, hop.bytes_down) == (0, 0)
    await talk.close()


async def test_rows_that_are_sent_again_replace_what_was_held(core: RunningCore, peer: Peer) -> None:
    rows, codec = some_rows(core), codec_of(core)
    talk = await opened(core, peer)
    await talk.send_rows(codec, some_rows(core, seed=1), 0)
    await talk.result()
    await talk.send_rows(codec, rows[:10], 0)
    first = decoded(codec, await talk.result())
    await talk.send_rows(codec, rows[10:], 10)
    second = decoded(codec, await talk.result())
    assert np.array_equal(np.concatenate([first, second]), expected(core, rows))
    await talk.close()


async def test_opened_says_what_was_agreed(core: RunningCore, peer: Peer) -> None:
    talk = peer.call()
    answer = await talk.open(digest_of(core))
    assert (answer.have, answer.steps_in_flight, answer.max_rows, answer.lease_ms) == (0, 4, 512, 30_000)
    [tier] = answer.tiers
    assert (tier.tier, tier.exact) == ("cloud", True)
    assert tier.fingerprint == core.service.shard.fingerprint
    await talk.close()
    assert (await peer.call().open(digest_of(core), steps_in_flight=1000)).steps_in_flight == 16


@pytest.mark.parametrize(
    ("fields", "error", "hint"),
    [
        ({"session": b"short"}, InvalidRequest, "16 bytes, not 5"),
        ({"serving_digest": "0" * 64}, DigestMismatch, "give all tiers the same bundle"),
        ({"capacity": 0}, InvalidRequest, "capacity is 0"),
        ({"capacity": 257}, PromptTooLong, "do not fit the model's 256"),
        ({"sampling": pb.Sampling(temperature=1)}, InvalidRequest, "not for this tier"),
    ],
)
async def test_an_open_that_cannot_be_is_refused_and_reserves_nothing(
    core: RunningCore, peer: Peer, fields: dict[str, Any], error: type[TrifoldError], hint: str
) -> None:
    opening = {
        "session": bytes(16),
        "epoch": 1,
        "serving_digest": digest_of(core),
        "capacity": 8,
        **fields,
    }
    talk = peer.call()
    await talk.say(pb.SessionRequest(open=pb.Open(**opening)))
    refusal = await talk.end()
    assert type(refusal) is error
    assert hint in refusal.message
    assert (len(core.service.table), core.service.table.reserved) == (0, 0)


async def test_a_stream_must_begin_with_open(core: RunningCore, peer: Peer) -> None:
    talk = peer.call()
    await talk.say(talk.step(0, 1, tokens=[1]))
    assert type(await talk.end()) is UnknownSession
    for first in (pb.SessionRequest(close=pb.Close()), pb.SessionRequest(), b"\xff\xff\xff"):
        talk = peer.call()
        await talk.say(first)
        assert type(await talk.end()) is InvalidRequest


async def test_a_stream_that_says_nothing_is_ended(
    core: RunningCore, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "OPEN_SECONDS", 0.1)
    assert type(await peer.call().end()) is DeadlineExceeded


@pytest.mark.parametrize(
    ("fields", "error", "hint"),
    [
        ({"session": bytes(16)}, UnknownSession, "has not opened"),
        ({"epoch": 9}, StaleEpoch, "epoch 9, its stream of epoch 1"),
        ({"seq": 5}, OutOfSequence, "step 5 came where step 1 was expected"),
        ({"base_pos": 6, "logits_from": 6}, OutOfSequence, "begins at position 6, the session holds 4"),
        ({"rows": 0}, InvalidRequest, "1 to 512"),
        ({"rows": 513}, InvalidRequest, "1 to 512"),
        ({"rows": 61}, InvalidRequest, "64 were reserved"),
        ({"logits_from": 3}, InvalidRequest, "4 to 5"),
        ({"logits_from": 6}, InvalidRequest, "4 to 5"),
        ({"codec": pb.CODEC_NONE}, BadRows, "is not the bundle's, int8"),
        ({"codec": 77}, BadRows, "is not the bundle's, int8"),
        ({"rows_data": b"\0" * 67}, BadRows, "take 68 bytes in codec int8, not 67"),
        ({"rows_data": b"\0" * 69}, BadRows, "take 68 bytes in codec int8, not 69"),
        ({"rows_data": b"\0\0\xc0\x7f" + bytes(64)}, BadRows, "not finite"),
        ({"tokens": [1]}, InvalidRequest, "a step of tokens where rows are expected"),
    ],
)
async def test_a_step_that_cannot_be_is_refused_with_the_reason_and_harms_no_neighbour(
    core: RunningCore, peer: Peer, fields: dict[str, Any], error: type[TrifoldError], hint: str
) -> None:
    codec, rows = codec_of(core), some_rows(core)
    neighbour = await opened(core, peer, held=4)
    talk = await opened(core, peer, held=4)
    good: dict[str, Any] = {"base_pos": 4, "rows": 1, "codec": codec.wire}
    if "tokens" not in fields:
        good["rows_data"] = codec.encode(rows[4:5], 4)
    await talk.say(talk.step(**{**good, **fields}))
    refusal = await talk.end()
    assert type(refusal) is error
    assert hint in refusal.message
    await neighbour.send_rows(codec, rows[4:], 4)
    assert np.array_equal(decoded(codec, await neighbour.result()), expected(core, rows)[4:])
    await neighbour.close()


async def test_a_second_open_on_a_stream_is_refused(core: RunningCore, peer: Peer) -> None:
    talk = await opened(core, peer)
    await talk.say(pb.SessionRequest(open=pb.Open()))
    refusal = await talk.end()
    assert type(refusal) is InvalidRequest
    assert "open where a Step or Close is expected" in refusal.message


async def test_more_steps_in_flight_than_agreed_are_refused(core: RunningCore, peer: Peer) -> None:
    talk = peer.call()
    assert (await talk.open(digest_of(core), steps_in_flight=2)).steps_in_flight == 2
    for base_pos in range(40):
        await talk.send_rows(codec_of(core), some_rows(core, length=40)[base_pos : base_pos + 1], base_pos)
    refusal = await talk.end()
    assert type(refusal) is InvalidRequest
    assert "agreed 2 steps" in refusal.message


async def test_a_message_above_the_limit_is_refused(core: RunningCore, peer: Peer) -> None:
    talk = await opened(core, peer)
    await talk.say(b"\0" * (4 * 1024 * 1024))
    assert type(await talk.end()) is InvalidRequest
    unlimited = grpc.aio.insecure_channel(core.address, [("grpc.max_send_message_length", -1)])
    async with unlimited as channel:
        talk = await opened(core, Peer(channel, "CoreService"))
        await talk.say(b"\0" * (4 * 1024 * 1024 + 1))
        assert type(await talk.end()) is MessageTooLarge


async def test_a_takeover_ends_the_older_stream_and_goes_on_from_what_is_held(
    core: RunningCore, peer: Peer
) -> None:
    rows, codec = some_rows(core), codec_of(core)
    older = await opened(core, peer, held=10)
    newer = peer.call()
    assert (await newer.open(digest_of(core), session=older.session, epoch=5)).have == 10
    ended = await older.end()
    assert type(ended) is StaleEpoch
    assert "epoch 5" in ended.message
    await newer.send_rows(codec, rows[10:], 10)
    assert np.array_equal(decoded(codec, await newer.result()), expected(core, rows)[10:])
    assert core.service.table.reserved == core.service.shard.cache_bytes(64)
    await newer.close()
    assert core.service.table.reserved == 0


@pytest.mark.parametrize("epoch", [0, 4, 5])
async def test_an_epoch_that_is_not_higher_is_refused_naming_the_current_one(
    core: RunningCore, peer: Peer, epoch: int
) -> None:
    held = await opened(core, peer, held=1, epoch=5)
    talk = peer.call()
    with pytest.raises(StaleEpoch, match="held in epoch 5"):
        await talk.open(digest_of(core), session=held.session, epoch=epoch)
    await held.send_rows(codec_of(core), some_rows(core)[1:2], 1)
    await held.result()
    await held.close()


async def test_a_session_cannot_be_taken_over_with_another_capacity(core: RunningCore, peer: Peer) -> None:
    held = await opened(core, peer, held=1)
    with pytest.raises(InvalidRequest, match="capacity of 64"):
        await peer.call().open(digest_of(core), capacity=65, session=held.session, epoch=2)
    await held.close()


async def test_a_takeover_in_the_middle_of_steps_finds_a_whole_prefix(core: RunningCore, peer: Peer) -> None:
    rows, codec = some_rows(core), codec_of(core)
    for _ in range(10):
        older = await opened(core, peer)
        for base_pos in range(0, 16, 4):
            await older.send_rows(codec, rows[base_pos : base_pos + 4], base_pos)
        newer = peer.call()
        have = (await newer.open(digest_of(core), session=older.session, epoch=2)).have
        assert have in (0, 4, 8, 12, 16)
        await newer.send_rows(codec, rows[have:], have)
        assert np.array_equal(decoded(codec, await newer.result()), expected(core, rows)[have:])
        assert type(await older.end()) is StaleEpoch
        await newer.close()


@pytest.mark.parametrize("leave", [Talk.hang_up, Talk.drop], ids=["in order", "by a crash"])
async def test_a_lost_stream_leaves_the_session_on_its_lease(
    core: RunningCore, peer: Peer, leave: Callable[[Talk], Awaitable[None]]
) -> None:
    lost = await opened(core, peer, held=10)
    await leave(lost)
    newer = peer.call()
    assert (await newer.open(digest_of(core), session=lost.session, epoch=2)).have == 10
    await newer.close()


async def test_a_session_is_forgotten_when_its_lease_runs_out(bundle: Path) -> None:
    async with running_core(bundle, lease=0.1) as core, Peer.at(core.address, "CoreService") as peer:
        lost = await opened(core, peer, held=10)
        await lost.drop()
        await settled(lambda: len(core.service.table) == 0)
        assert core.service.table.reserved == 0
        newer = peer.call()
        assert (await newer.open(digest_of(core), session=lost.session, epoch=2)).have == 0
        # A session with a stream needs no lease.
        await newer.send_rows(codec_of(core), some_rows(core)[:1], 0)
        await newer.result()
        await asyncio.sleep(0.3)
        assert len(core.service.table) == 1
        await newer.close()


async def test_a_session_that_holds_nothing_is_not_kept(core: RunningCore, peer: Peer) -> None:
    talk = await opened(core, peer)
    await talk.drop()
    await settled(lambda: len(core.service.table) == 0)


async def test_memory_is_reserved_at_open_or_the_open_is_refused(bundle: Path) -> None:
    room = shard(bundle, "cloud").cache_bytes(64)
    async with running_core(bundle, memory=2 * room) as core, Peer.at(core.address, "CoreService") as peer:
        first, second = await opened(core, peer), await opened(core, peer)
        with pytest.raises(Overloaded, match="2 sessions hold") as refusal:
            await opened(core, peer)
        assert refusal.value.retry_after
        await first.close()
        third = await opened(core, peer)
        with pytest.raises(PromptTooLong, match="this tier has"):
            await opened(core, peer, capacity=256)
        await second.close()
        await third.close()


async def test_a_step_of_a_branch_that_was_given_up_gets_an_empty_answer(
    core: RunningCore, peer: Peer
) -> None:
    rows, codec = some_rows(core), codec_of(core)
    talk = await opened(core, peer, held=4)
    await talk.send_rows(codec, rows[4:6], 4, branch=3)
    assert not (await talk.result()).stale
    await talk.send_rows(codec, some_rows(core, seed=9)[6:8], 6, branch=2)
    stale = await talk.result()
    assert (stale.stale, stale.header.rows, stale.rows, stale.header.seq) == (True, 0, b"", 2)
    await talk.send_rows(codec, rows[6:], 6, branch=3)
    assert np.array_equal(decoded(codec, await talk.result()), expected(core, rows)[6:])
    await talk.close()


async def test_a_failing_engine_ends_one_session_with_a_public_message_and_no_other(
    core: RunningCore, peer: Peer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    neighbour, talk = await opened(core, peer, held=4), await opened(core, peer, held=4)
    run = core.service.shard.run

    def fail(cache: Cache, rows: Rows, base_pos: int, logits_from: int | None = None) -> Rows:
        if len(rows) == 3:
            raise ZeroDivisionError("a secret of the house")
        return run(cache, rows, base_pos, logits_from)

    monkeypatch.setattr(core.service.shard, "run", fail)
    with caplog.at_level(logging.ERROR):
        await talk.send_rows(codec_of(core), some_rows(core)[4:7], 4)
        error = await talk.end()
    assert type(error) is TrifoldError
    assert "secret" not in error.message
    assert "a secret of the house" in caplog.text
    assert talk.session.hex() not in caplog.text
    await neighbour.send_rows(codec_of(core), some_rows(core)[4:], 4)
    await neighbour.result()
    # What a failed engine left behind is not resumed.
    assert (await peer.call().open(digest_of(core), session=talk.session, epoch=2)).have == 0
    await neighbour.close()


def live_caches() -> int:
    gc.collect()
    return sum(type(thing) is Cache for thing in gc.get_objects())


async def come_and_go(core: RunningCore, peer: Peer, sessions: int) -> None:
    """So many sessions, begun and ended in all the ways there are."""
    for number in range(sessions):
        talk = await opened(core, peer, held=number % 3)
        match number % 4:
            case 0:
                await talk.close()
            case 1:
                await talk.drop()
            case 2:
                await talk.say(b"\xff")
                await talk.end()
            case 3:
                newer = peer.call()
                await newer.open(digest_of(core), session=talk.session, epoch=2)
                await newer.close()
    await settled(lambda: len(core.service.table) == 0)


async def test_ended_sessions_leave_nothing_behind(bundle: Path) -> None:
    async with running_core(bundle, lease=0.05) as core, Peer.at(core.address, "CoreService") as peer:
        await come_and_go(core, peer, 4)
        caches, tasks = live_caches(), len(asyncio.all_tasks())
        await come_and_go(core, peer, 60)
        await settled(lambda: len(asyncio.all_tasks()) <= tasks)
        assert live_caches() == caches
        assert core.service.table.reserved == 0


async def test_a_planted_leak_is_found_by_the_count_of_live_caches(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_core(bundle, lease=0.05) as core, Peer.at(core.address, "CoreService") as peer:
        make, hoard = core.service.shard.cache, list[Cache]()

        def keep(capacity: int) -> Cache:
            hoard.append(make(capacity))
            return hoard[-1]

        monkeypatch.setattr(core.service.shard, "cache", keep)
        before = live_caches()
        await come_and_go(core, peer, 8)
        assert live_caches() == before + 8


async def test_a_reader_that_stalls_holds_up_nobody_else(core: RunningCore, peer: Peer) -> None:
    """Each answer of the stalled one is larger than what gRPC would buffer."""
    rows, codec = some_rows(core), codec_of(core)
    async with Peer.at(core.address, "CoreService") as other:
        stalled = await opened(core, other, capacity=256)
        many = some_rows(core, length=256)
        for _ in range(4):
            await stalled.send_rows(codec, many, 0)
        talk = await opened(core, peer)
        await talk.send_rows(codec, rows, 0)
        assert np.array_equal(decoded(codec, await talk.result()), expected(core, rows))
        await talk.close()
        # One that stalls and goes on writing is refused by the number of steps in flight.
        for _ in range(16):
            await stalled.send_rows(codec, many, 0)
        newer = peer.call()
        await newer.open(digest_of(core), session=stalled.session, epoch=2, capacity=256)
        await newer.close()


async def test_describe_tells_what_the_tier_is_and_how_busy(core: RunningCore, peer: Peer) -> None:
    talk = await opened(core, peer)
    told = await peer.describe()
    assert told.serving_digest == digest_of(core)
    assert (told.max_positions, told.max_rows, told.sessions, told.draining) == (256, 512, 1, False)
    assert told.kv_bytes == core.service.shard.cache_bytes(64) <= told.kv_bytes_limit
    assert [tier.tier for tier in told.tiers] == ["cloud"]
    await talk.close()
    with pytest.raises(InvalidRequest, match="not a DescribeRequest"):
        await peer.describe(b"\xff")


async def health(address: str) -> int:
    async with connect(address) as channel:
        request = health_pb2.HealthCheckRequest(service="trifold.proto.v1.CoreService")
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=20)
        status: int = answer.status
        return status


async def test_health_and_reflection_are_served(core: RunningCore) -> None:
    assert await health(core.address) == health_pb2.HealthCheckResponse.SERVING
    async with connect(core.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        async for response in stub.ServerReflectionInfo(requests, timeout=20):
            names = {service.name for service in response.list_services_response.service}
            assert {"trifold.proto.v1.CoreService", "grpc.health.v1.Health"} <= names


async def test_draining_admits_nobody_and_lets_those_end_who_run(core: RunningCore, peer: Peer) -> None:
    rows, codec = some_rows(core), codec_of(core)
    talk = await opened(core, peer, held=4)
    draining = asyncio.create_task(core.server.drain(20))
    await settled(lambda: core.service.table.draining)
    assert await health(core.address) == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(Unavailable, match="shutting down"):
        await opened(core, peer)
    await talk.send_rows(codec, rows[4:], 4)
    assert np.array_equal(decoded(codec, await talk.result()), expected(core, rows)[4:])
    assert not draining.done()
    await talk.close()
    await draining


async def test_who_still_runs_when_the_grace_is_over_is_told_to_resume(core: RunningCore, peer: Peer) -> None:
    talk = await opened(core, peer, held=4)
    await core.server.drain(0.05)
    await core.server.stop()
    error = await talk.end()
    assert type(error) is Unavailable
    assert "resume" in error.message


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.org:0"])
async def test_services_listen_on_loopback_only(bundle: Path, listen: str) -> None:
    with pytest.raises(ConfigError, match="without TLS"):
        async with running_core(bundle, listen=listen):
            pass


async def test_a_port_that_is_taken_is_refused(core: RunningCore, bundle: Path) -> None:
    with pytest.raises(ConfigError, match="is another service there"):
        async with running_core(bundle, listen=core.address):
            pass
