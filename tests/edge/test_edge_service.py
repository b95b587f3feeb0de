from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.network.proxy import Proxy
from tests.tiers import RunningCore, RunningEdge, running_core, running_edge, shard
from tests.wire import Peer, Talk, decoded
from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.errors import (
    DigestMismatch,
    InvalidRequest,
    OutOfSequence,
    Overloaded,
    StaleEpoch,
    TrifoldError,
    Unavailable,
)
from trifold.shared.runtime.codec import RowCodec, Rows
from trifold.shared.runtime.monolith import Monolith

LENGTH = 40


@cache
def monolith(bundle: Path) -> Monolith:
    manifest = TierFolder.open(bundle, "edge").manifest
    return Monolith(manifest, shard(bundle, "edge"), shard(bundle, "cloud"), shard(bundle, "device"))


class House:
    """A core, an edge before it, a proxy on the link between them, and a peer of the edge."""

    def __init__(self, bundle: Path, core: RunningCore, link: Proxy, edge: RunningEdge, peer: Peer) -> None:
        self.bundle = bundle
        self.core = core
        self.link = link
        self.edge = edge
        self.peer = peer
        self.monolith = monolith(bundle)
        self.codec: RowCodec = self.monolith.codec
        self.digest = self.monolith.manifest.serving_digest

    @classmethod
    @asynccontextmanager
    async def up(cls, bundle: Path, **fields: Any) -> AsyncIterator[House]:
        async with (
            running_core(bundle, **fields) as core,
            Proxy(core.address) as link,
            running_edge(bundle, link.address, **fields) as edge,
            Peer.at(edge.address, "EdgeService") as peer,
        ):
            yield cls(bundle, core, link, edge, peer)

    def tokens(self, seed: int = 0) -> NDArray[np.int64]:
        return np.random.default_rng(seed).integers(0, self.monolith.edge.vocab, LENGTH)

    def expected(self, tokens: NDArray[np.int64]) -> Rows:
        """The rows that a device must get, from the monolith in one piece."""
        session = self.monolith.session(len(tokens))
        session.feed(tokens, 0, 0)
        return session.rows

    async def opened(self, held: int = 0, **fields: Any) -> Talk:
        """A stream whose session holds so many positions in both tiers."""
        talk = self.peer.call()
        await talk.open(self.digest, **fields)
        if held:
            await talk.send_tokens(self.tokens()[:held], 0)
            await talk.result()
        return talk

    async def rest(self, talk: Talk, have: int) -> None:
        """Sends what is missing from `have` on, and expects the bits of the monolith."""
        await talk.send_tokens(self.tokens()[have:], have)
        got = decoded(self.codec, await talk.result())
        assert np.array_equal(got, self.expected(self.tokens())[have:])


@pytest.fixture
async def house(bundle: Path) -> AsyncIterator[House]:
    async with House.up(bundle) as house:
        yield house


async def settled(condition: Callable[[], bool]) -> None:
    """Waits until the services have noticed."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - the services have no event for a test
            await asyncio.sleep(0.005)


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


async def test_a_core_that_is_lost_ends_the_stream_and_the_session_goes_on_where_it_was(
    house: House,
) -> None:
    talk = await house.opened(held=10)
    await house.link.cut()
    error = await talk.end()
    assert type(error) is Unavailable
    again = house.peer.call()
    assert (await again.open(house.digest, session=talk.session, epoch=2)).have == 10
    await house.rest(again, 10)
    await again.close()


async def test_a_core_that_is_lost_in_the_middle_of_steps_loses_none_of_them(house: House) -> None:
    for round_ in range(8):
        talk = await house.opened()
        for base_pos in range(0, LENGTH, 10):
            await talk.send_tokens(house.tokens()[base_pos : base_pos + 10], base_pos)
        await asyncio.sleep(0.001 * round_)
        await house.link.cut()
        assert type(await talk.end()) is Unavailable
        again = house.peer.call()
        opened = await again.open(house.digest, session=talk.session, epoch=2)
        assert opened.have % 10 == 0
        await house.rest(again, min(opened.have, 30))
        await again.close()


async def test_a_core_that_forgot_everything_is_told_everything_again(house: House) -> None:
    talk = await house.opened(held=10)
    await house.core.server.stop()
    assert type(await talk.end()) is Unavailable
    async with running_core(house.bundle) as other:
        house.link.target = other.address
        await house.link.cut()
        again = house.peer.call()
        assert (await again.open(house.digest, session=talk.session, epoch=2)).have == 0
        await house.rest(again, 0)
        await again.close()


async def test_an_edge_that_forgot_everything_is_told_everything_again(house: House) -> None:
    talk = await house.opened(held=10)
    async with (
        running_edge(house.bundle, house.link.address) as other,
        Peer.at(other.address, "EdgeService") as peer,
    ):
        again = peer.call()
        assert (await again.open(house.digest, session=talk.session, epoch=2)).have == 0
        # The core was taken over, and so the older edge has to let its device go.
        assert type(await talk.end()) is StaleEpoch
        await house.rest(again, 0)
        await again.close()


async def test_a_core_that_comes_back_within_a_moment_is_waited_for(house: House) -> None:
    talk = await house.opened(held=10)
    house.link.refuse(True)
    await house.link.cut()
    assert type(await talk.end()) is Unavailable
    again = house.peer.call()
    opening = asyncio.create_task(again.open(house.digest, session=talk.session, epoch=2))
    await asyncio.sleep(0.5)
    assert not opening.done()
    house.link.refuse(False)
    assert (await opening).have == 10
    await again.close()


async def test_a_core_that_is_not_there_is_named(bundle: Path, unused_tcp_port: int) -> None:
    address = f"127.0.0.1:{unused_tcp_port}"
    async with running_edge(bundle, address) as edge, Peer.at(edge.address, "EdgeService") as peer:
        for ask in (peer.call().open(edge.service.frames.digest), peer.describe()):
            with pytest.raises(Unavailable, match=f"the core at {address}"):
                await ask
        assert len(edge.service.table) == 0


async def test_close_frees_both_tiers_at_once(house: House) -> None:
    talk = await house.opened(held=10)
    assert house.edge.service.table.reserved > 0
    await talk.close()
    assert (house.edge.service.table.reserved, house.core.service.table.reserved) == (0, 0)


async def test_close_in_the_middle_of_steps_frees_both_tiers(house: House) -> None:
    for _ in range(5):
        talk = await house.opened()
        for base_pos in range(0, LENGTH, 10):
            await talk.send_tokens(house.tokens()[base_pos : base_pos + 10], base_pos)
        await talk.close()
        assert (len(house.edge.service.table), len(house.core.service.table)) == (0, 0)


@pytest.mark.parametrize("leave", [Talk.hang_up, Talk.drop], ids=["in order", "by a crash"])
async def test_a_device_that_is_lost_finds_both_tiers_as_they_were(
    house: House, leave: Callable[[Talk], Awaitable[None]]
) -> None:
    talk = await house.opened(held=10)
    await leave(talk)
    again = house.peer.call()
    assert (await again.open(house.digest, session=talk.session, epoch=2)).have == 10
    await house.rest(again, 10)
    await again.close()


async def test_both_tiers_forget_a_device_that_stays_away(bundle: Path) -> None:
    async with House.up(bundle, lease=0.1) as house:
        talk = await house.opened(held=10)
        await talk.drop()
        await settled(lambda: not len(house.edge.service.table) and not len(house.core.service.table))
        assert (house.edge.service.table.reserved, house.core.service.table.reserved) == (0, 0)


async def test_a_takeover_ends_the_older_device_stream(house: House) -> None:
    older = await house.opened(held=10)
    newer = house.peer.call()
    assert (await newer.open(house.digest, session=older.session, epoch=3)).have == 10
    assert type(await older.end()) is StaleEpoch
    with pytest.raises(StaleEpoch, match="held in epoch 3"):
        await house.peer.call().open(house.digest, session=older.session, epoch=2)
    await house.rest(newer, 10)
    await newer.close()


async def test_the_tier_that_holds_least_decides_where_to_go_on(house: House) -> None:
    talk = await house.opened(held=10)
    house.link.stall()
    await talk.send_tokens(house.tokens()[10:20], 10)
    [session] = house.edge.service.table._sessions.values()
    await settled(lambda: session.have == 20)
    house.link.flow()
    await house.link.cut()
    assert type(await talk.end()) is Unavailable
    [held] = house.core.service.table._sessions.values()
    again = house.peer.call()
    have = (await again.open(house.digest, session=talk.session, epoch=2)).have
    assert have == min(session.have, held.have)
    await again.send_tokens(house.tokens()[25:30], 25)
    error = await again.end()
    assert type(error) is OutOfSequence
    assert f"expected position {have}" in error.message


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
    with pytest.raises(DigestMismatch, match="no adapter"):
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
    room = shard(bundle, "cloud").cache_bytes(64)
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
