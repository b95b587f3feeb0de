from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cloud.cores import codec_of, digest_of, expected, opened, settled, some_rows
from tests.tiers import RunningCore, engine, running_core
from tests.wire import Peer, Talk, decoded
from trifold.cloud.core.engines.onnxruntime.attention import Cache
from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import (
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    StaleEpoch,
    Unavailable,
)
from trifold.shared.session import table as table_module
from trifold.shared.session.announcement import announcement
from trifold.shared.session.table import Seat, Session


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
    assert core.service.table.reserved == engine(core.bundle).cache_bytes(64)
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
    room = engine(bundle).cache_bytes(64)
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


async def test_the_number_of_sessions_is_limited_as_well(
    core: RunningCore, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_module, "MOST_SESSIONS", 1)
    first = await opened(core, peer)
    with pytest.raises(Overloaded, match="1 sessions hold"):
        await opened(core, peer)
    await first.close()


async def test_so_many_sessions_run_at_a_time_and_the_next_is_told_when_to_come(bundle: Path) -> None:
    async with running_core(bundle, streams=2) as core, Peer.at(core.address, "CoreService") as peer:
        first, second = await opened(core, peer), await opened(core, peer)
        with pytest.raises(Overloaded, match="all 2 sessions") as refusal:
            await opened(core, peer)
        assert refusal.value.retry_after
        await first.close()
        third = await opened(core, peer)
        await second.close()
        await third.close()


async def test_a_call_that_announces_a_new_session_is_refused_before_it_says_anything(bundle: Path) -> None:
    new = announcement(pb.Open(epoch=1))
    async with running_core(bundle, streams=1) as core, Peer.at(core.address, "CoreService") as peer:
        first = peer.call(*new)
        await first.open(digest_of(core))
        error = await peer.call(*new).end()
        assert isinstance(error, Overloaded)
        assert error.retry_after
        later = peer.call(*announcement(pb.Open(epoch=2)))  # may have been here before
        assert (await later.open(digest_of(core), session=first.session, epoch=2)).have == 0
        await later.close()
        await peer.call(*new).open(digest_of(core))


async def test_who_resumes_was_admitted_before_and_is_let_in_above_the_limit(bundle: Path) -> None:
    async with running_core(bundle, streams=1) as core, Peer.at(core.address, "CoreService") as peer:
        first = await opened(core, peer, held=1)
        restarted = peer.call()  # of a session that this core has lost
        assert (await restarted.open(digest_of(core), epoch=2, admitted=True)).have == 0
        with pytest.raises(Overloaded):
            await peer.call().open(digest_of(core), epoch=2)  # it was refused before
        taken_over = peer.call()
        assert (await taken_over.open(digest_of(core), session=first.session, epoch=2)).have == 1
        await restarted.close()
        await taken_over.close()


def seat_of(core: RunningCore, talk: Talk) -> Seat[Cache]:
    seat = core.service.table._sessions["", talk.session].seat
    assert seat
    return seat


async def test_a_stream_that_nobody_uses_gives_way_and_its_session_is_resumed(bundle: Path) -> None:
    memory = 3 * engine(bundle).cache_bytes(64)
    async with (
        running_core(bundle, streams=1, memory=memory) as core,
        Peer.at(core.address, "CoreService") as peer,
    ):
        idle = await opened(core, peer, held=1)
        with pytest.raises(Overloaded, match="running"):
            await opened(core, peer)
        seat_of(core, idle).idle = lambda: core.service.table.lease
        with pytest.raises(Overloaded, match="no room"):
            await opened(core, peer, capacity=4 * 64)
        assert not seat_of(core, idle).lost.done()  # nobody gives way to who is refused all the same
        other = await opened(core, peer)
        ended = await idle.end()
        assert type(ended) is Unavailable
        assert "idle" in ended.message
        again = peer.call()
        assert (await again.open(digest_of(core), session=idle.session, epoch=2)).have == 1
        await again.close()
        await other.close()


async def test_a_stream_is_idle_while_it_is_its_callers_turn_and_not_while_a_step_waits(
    core: RunningCore, peer: Peer
) -> None:
    talk, released = await opened(core, peer, held=1), threading.Event()
    seat = seat_of(core, talk)
    await asyncio.sleep(0.01)
    assert seat.idle() > 0
    busy = core.service.scheduler.run("somebody else", released.wait)
    await talk.send_rows(codec_of(core), some_rows(core)[1:2], 1)
    await settled(lambda: seat.idle() == 0)
    released.set()
    await busy
    await talk.result()
    await asyncio.sleep(0.01)
    assert seat.idle() > 0
    await talk.close()


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
        make, hoard = engine(core.bundle).cache, list[Cache]()

        def keep(capacity: int) -> Cache:
            hoard.append(make(capacity))
            return hoard[-1]

        monkeypatch.setattr(engine(core.bundle), "cache", keep)
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


class Maker:
    """Makes caches that take their time: meanwhile the session is given up."""

    def __init__(self) -> None:
        self.session: Session[Any] = Session(pb.Open(session=b"one", epoch=1, capacity=8), "", 0, 1)
        self.made, self.released = list[object](), list[object]()

    def cache(self, capacity: int) -> Any:
        self.made.append(object())
        self.session.give_up(self)
        return self.made[-1]

    def cache_bytes(self, capacity: int) -> int:
        return 0

    def release(self, cache: Any) -> None:
        self.released.append(cache)


def test_a_session_that_is_given_up_while_its_cache_is_made_leaves_none() -> None:
    maker = Maker()
    maker.session.hold(maker)
    assert maker.session.cache is None
    assert maker.released == maker.made
    maker.session.give_up(maker)
    assert len(maker.released) == 1
