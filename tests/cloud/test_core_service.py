from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest

from tests.cloud.cores import LENGTH, codec_of, digest_of, expected, opened, some_rows
from tests.tiers import RunningCore, engine, running_core
from tests.wire import Peer, decoded
from trifold.cloud.core.engines.engine import Part
from trifold.cloud.core.engines.onnxruntime.attention import Cache
from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import (
    BadRows,
    DeadlineExceeded,
    DigestMismatch,
    InvalidRequest,
    MessageTooLarge,
    OutOfSequence,
    PromptTooLong,
    StaleEpoch,
    TrifoldError,
    UnknownSession,
)
from trifold.shared.runtime.codec import Rows
from trifold.shared.session import stream as stream_module


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
    assert tier.fingerprint == engine(core.bundle).fingerprint
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
    talk, busy = peer.call(), threading.Event()
    assert (await talk.open(digest_of(core), steps_in_flight=2)).steps_in_flight == 2
    turn = core.service.scheduler.run("somebody else", lambda: busy.wait(20))
    for base_pos in range(3):
        await talk.send_rows(codec_of(core), some_rows(core)[base_pos : base_pos + 1], base_pos)
    refusal = await talk.end()
    busy.set()
    await turn
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
    run = engine(core.bundle).run

    def fail(batch: Sequence[Part[Cache]]) -> list[Rows]:
        if any(len(part.rows) == 3 for part in batch):
            raise ZeroDivisionError("a secret of the house")
        return run(batch)

    monkeypatch.setattr(engine(core.bundle), "run", fail)
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
