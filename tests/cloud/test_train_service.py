from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from tests.cloud.cores import settled
from tests.cloud.trainings import LENGTH, RunningTraining, running_training, shard, some
from tests.shared.sites import train_bundle
from trifold.cloud.train import sites
from trifold.proto.v1 import session_pb2
from trifold.proto.v1 import train_pb2 as pb
from trifold.shared.errors import (
    BadRows,
    DigestMismatch,
    InvalidRequest,
    Overloaded,
    StaleEpoch,
    TrifoldError,
    Unavailable,
    UnknownSession,
)
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.session.pieces import PIECE_BYTES
from trifold.shared.training import wire
from trifold.shared.training.site import LocalCore


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bundle("deepseek_v3", tmp_path_factory.mktemp("train"))[1]


@pytest.fixture
async def training(bundle: Path) -> AsyncIterator[RunningTraining]:
    async with running_training(bundle) as training:
        yield training


async def test_rows_and_gradients_are_those_of_the_core(bundle: Path, training: RunningTraining) -> None:
    local = LocalCore(shard(bundle), training.codec, training.codec)
    talk = await training.opened()
    for number in range(3):
        rows, gradients = some(training.codec, number), some(training.codec, 10 + number)
        batch, there = local.forward(rows, keep=True)
        assert np.array_equal(await talk.forward(rows, number), there)
        _, back = await talk.backward(gradients, number)
        assert np.array_equal(back, local.backward(batch, gradients))
    await talk.close()


async def test_opened_and_describe_tell_limits_load_and_traffic(training: RunningTraining) -> None:
    talk = training.call()
    opened = await talk.open()
    assert (opened.max_rows, opened.max_batches, opened.lease_ms) == (64 * 2**20 // 256, 8, 30_000)
    assert opened.tier.fingerprint.startswith("torch-")
    await talk.forward(some(training.codec))
    told = await training.describe()
    assert told.serving_digest == training.service.digest
    assert (told.sites, told.batches, told.recomputed, told.draining) == (1, 1, 0, False)
    assert 0 < told.activation_bytes <= told.activation_bytes_limit
    rows = len(some(training.codec)) * training.codec.size(LENGTH, 0)
    assert rows < told.traffic.rows_up < rows + 40
    assert rows < told.traffic.rows_down < rows + 40
    assert (told.traffic.gradients_up, told.traffic.gradients_down) == (0, 0)
    await talk.close()
    told = await training.describe()
    assert (told.sites, told.batches, told.activation_bytes) == (0, 0, 0)
    with pytest.raises(InvalidRequest, match="not a TrainDescribeRequest"):
        await training.describe(b"\xff")


async def test_a_batch_goes_back_once_and_an_unknown_one_is_said_to_be_forgotten(
    training: RunningTraining,
) -> None:
    talk = await training.opened()
    await talk.forward(some(training.codec))
    assert not (await talk.backward(some(training.codec)))[0].forgotten
    assert (await talk.backward(some(training.codec)))[0].forgotten
    await talk.forward(some(training.codec), 2, keep=False)
    assert (await talk.backward(some(training.codec), 2))[0].forgotten
    await talk.close()


async def test_only_so_many_batches_of_a_site_are_held(training: RunningTraining) -> None:
    talk = await training.opened()
    for number in range(10):
        await talk.forward(some(training.codec, number), number)
    answers = [(await talk.backward(some(training.codec), number))[0] for number in range(10)]
    assert [answer.forgotten for answer in answers] == [True, True] + [False] * 8
    assert training.service.core.activations.size == 0
    await talk.close()


async def test_a_lost_site_finds_its_batch_within_the_lease(training: RunningTraining) -> None:
    talk = await training.opened()
    await talk.forward(some(training.codec))
    talk.drop()
    again = await training.opened(session=talk.session)
    answer, _ = await again.backward(some(training.codec))
    assert (answer.forgotten, answer.recomputed) == (False, False)
    await again.close()


async def test_a_site_is_given_up_with_its_activations_when_the_lease_ends(bundle: Path) -> None:
    async with running_training(bundle, lease=0.05) as training:
        talk = await training.opened()
        await talk.forward(some(training.codec))
        assert training.service.core.activations.size > 0
        talk.drop()
        await settled(lambda: len(training.service.table) == 0)
        assert training.service.core.activations.size == 0
        again = await training.opened(session=talk.session)
        assert (await again.backward(some(training.codec)))[0].forgotten
        await again.close()


async def test_without_memory_for_activations_the_gradients_are_the_same_bits(bundle: Path) -> None:
    async with running_training(bundle, memory=0) as training:
        local = LocalCore(shard(bundle), training.codec, training.codec)
        talk = await training.opened()
        for number in range(3):
            rows, gradients = some(training.codec, number), some(training.codec, 10 + number)
            batch, there = local.forward(rows, keep=True)
            assert np.array_equal(await talk.forward(rows, number), there)
            answer, back = await talk.backward(gradients, number)
            assert answer.recomputed
            assert np.array_equal(back, local.backward(batch, gradients))
        assert (await training.describe()).recomputed == 3
        await talk.close()


async def test_a_second_stream_of_a_site_ends_the_first(training: RunningTraining) -> None:
    first = await training.opened()
    await first.forward(some(training.codec))
    second = await training.opened(session=first.session)
    assert type(await first.end()) is StaleEpoch
    assert not (await second.backward(some(training.codec)))[0].forgotten
    await second.close()


async def test_sites_that_train_at_once_get_each_their_own(bundle: Path, training: RunningTraining) -> None:
    local = LocalCore(shard(bundle), training.codec, training.codec)

    async def train(seed: int) -> None:
        talk = await training.opened()
        for number in range(5):
            rows = some(training.codec, seed + number)
            assert np.array_equal(await talk.forward(rows, number), local.forward(rows, keep=False)[1])
            assert not (await talk.backward(some(training.codec, seed), number))[0].forgotten
        await talk.close()

    await asyncio.gather(train(100), train(200), train(300))


async def test_a_stopping_process_ends_idle_sites_at_once_and_others_with_their_answer(
    training: RunningTraining,
) -> None:
    idle, busy = await training.opened(), await training.opened()
    asked = asyncio.create_task(busy.forward(some(training.codec, sequences=8, length=128)))
    await settled(lambda: any(site.batches for site in training.service.table._sites.values()))
    async with asyncio.timeout(20):
        await training.server.drain(20)
    assert (await asked).shape == (8, 128, 64)
    assert type(await idle.end()) is Unavailable
    assert type(await busy.end()) is Unavailable
    with pytest.raises(Unavailable, match="shutting down"):
        await training.opened()


async def test_there_is_room_for_so_many_sites(
    training: RunningTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sites, "MOST_SITES", 2)
    talks = [await training.opened(), await training.opened()]
    with pytest.raises(Overloaded, match="2 sites train here already"):
        await training.opened()
    await talks[0].close()
    await (await training.opened()).close()
    await talks[1].close()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"session": b"short"}, InvalidRequest, "16 bytes, not 5"),
        ({"serving_digest": "0" * 64}, DigestMismatch, "give the site and the cloud the same bundle"),
        ({"gradients": session_pb2.CODEC_UNSPECIFIED}, InvalidRequest, "no codec for gradients"),
        ({"gradients": 17}, InvalidRequest, "no codec for gradients"),
    ],
)
async def test_a_wrong_open_is_refused(
    training: RunningTraining, fields: dict[str, object], error: type[TrifoldError], message: str
) -> None:
    with pytest.raises(error, match=message):
        await training.opened(**fields)


@pytest.mark.parametrize(
    ("batch", "size", "error", "message"),
    [
        ({"sequences": 0}, 0, InvalidRequest, "0 sequences of 8 rows"),
        ({"length": 0}, 0, InvalidRequest, "2 sequences of 0 rows"),
        ({"length": 257}, 0, InvalidRequest, "a sequence has 1 to 256"),
        ({"sequences": 2**32 - 1}, 0, InvalidRequest, "262144 at most"),
        ({"codec": session_pb2.CODEC_NONE}, 0, BadRows, "not the one agreed on, int8"),
        ({}, 2000, BadRows, "2000 bytes or more where the batch takes 1568"),
    ],
)
async def test_a_wrong_batch_is_refused_by_its_header(
    training: RunningTraining, batch: dict[str, int], size: int, error: type[TrifoldError], message: str
) -> None:
    talks = [await training.opened(), await training.opened()]
    asked, data = talks[0].batch(**batch), bytes(size)
    await talks[0].say(pb.TrainRequest(forward=pb.Forward(batch=asked, data=data)))
    await talks[1].say(pb.TrainRequest(backward=pb.Backward(batch=asked, data=data)))
    for talk in talks:
        problem = await talk.end()
        assert type(problem) is error
        assert message in problem.message


async def test_gradients_of_another_shape_than_the_batch_are_refused(training: RunningTraining) -> None:
    talk = await training.opened()
    await talk.forward(some(training.codec))
    with pytest.raises(InvalidRequest, match="gradients of 1 sequences of 16 for 2 of 8"):
        await talk.backward(some(training.codec, sequences=1, length=16))
    assert len(training.service.table) == 0


async def test_a_batch_may_come_in_pieces_and_nothing_else_may_come_between(
    bundle: Path, training: RunningTraining
) -> None:
    talk = await training.opened(gradients=session_pb2.CODEC_NONE)
    codec = RowCodec("none", 64)
    rows = some(training.codec, sequences=40, length=256)
    await talk.forward(rows)
    data = wire.encode(some(codec, sequences=40, length=256), codec)
    batch = talk.batch(sequences=40, length=256, codec=codec.wire)
    asked = pb.Backward(batch=batch, data=data[:PIECE_BYTES])
    rest = data[PIECE_BYTES:]
    await talk.say(pb.TrainRequest(backward=asked))
    before = training.service.traffic.gradients_up
    # A larger piece than need be, then the last one, which may be as small as it is.
    for piece in (rest[:-5], rest[-5:]):
        await talk.say(pb.TrainRequest(piece=pb.Piece(data=piece)))
    first = (await talk.hear("computed")).computed.data
    pieces = [first]
    while sum(map(len, pieces)) < len(data):
        pieces.append((await talk.hear("piece")).piece.data)
    local = LocalCore(shard(bundle), training.codec, codec)
    kept, _ = local.forward(rows, keep=True)
    expected = local.backward(kept, wire.decode(data, 40, 256, codec))
    assert np.array_equal(wire.decode(b"".join(pieces), 40, 256, codec), expected)
    assert training.service.traffic.gradients_up - before > len(rest)
    await talk.say(pb.TrainRequest(backward=asked))
    await talk.say(pb.TrainRequest(piece=pb.Piece(data=b"12")))
    problem = await talk.end()
    assert type(problem) is BadRows
    assert "a piece of 2 bytes where" in problem.message
    other = await training.opened(gradients=session_pb2.CODEC_NONE)
    await other.say(pb.TrainRequest(backward=asked))
    await other.say(pb.TrainRequest(backward=asked))
    problem = await other.end()
    assert type(problem) is InvalidRequest
    assert "backward where the next Piece" in problem.message


async def test_a_stream_begins_with_open_and_goes_on_with_batches(training: RunningTraining) -> None:
    talk = training.call()
    await talk.say(pb.TrainRequest(forward=pb.Forward()))
    assert type(await talk.end()) is UnknownSession
    talk = await training.opened()
    await talk.say(pb.TrainRequest(open=pb.TrainOpen()))
    assert type(await talk.end()) is InvalidRequest
    talk = await training.opened()
    await talk.say(b"\xff\xff")
    problem = await talk.end()
    assert type(problem) is InvalidRequest
    assert "not a TrainRequest" in problem.message


def test_the_wire_has_a_field_for_neither_text_nor_tokens_nor_labels() -> None:
    # Row and gradient bytes are checked for size, so nothing can ride along in them.
    names = {
        field.full_name.removeprefix("trifold.proto.v1.")
        for message in (
            pb.TrainRequest,
            pb.Batch,
            pb.TrainOpen,
            pb.Forward,
            pb.Backward,
            pb.Piece,
            pb.TrainClose,
        )
        for field in message.DESCRIPTOR.fields
    }
    kinds = {f"TrainRequest.{kind}" for kind in ("open", "forward", "backward", "piece", "close")}
    batch = {f"Batch.{name}" for name in ("id", "sequences", "length", "codec")}
    opening = {f"TrainOpen.{name}" for name in ("session", "serving_digest", "gradients")}
    data = {"Forward.batch", "Forward.keep", "Forward.data", "Backward.batch", "Backward.data", "Piece.data"}
    assert names == kinds | batch | opening | data
