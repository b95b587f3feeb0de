from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tests.edge.houses import LENGTH, House, settled
from tests.tiers import running_core, running_edge
from tests.wire import Peer, Talk
from trifold.shared.errors import (
    DeadlineExceeded,
    OutOfSequence,
    StaleEpoch,
    Unavailable,
)
from trifold.shared.session import channel as channel_module


@pytest.fixture
async def house(bundle: Path) -> AsyncIterator[House]:
    async with House.up(bundle) as house:
        yield house


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


async def test_a_core_that_falls_silent_is_given_up_and_the_session_kept(bundle: Path) -> None:
    async with House.up(bundle, patience=0.4) as house:
        talk = await house.opened(held=10)
        # One who is idle waits for nothing.
        await asyncio.sleep(0.6)
        house.link.stall()
        await talk.send_tokens(house.tokens()[10:20], 10)
        error = await talk.end()
        assert type(error) is DeadlineExceeded
        assert "sent no result for 0.4 s" in error.message
        house.link.flow()
        again = house.peer.call()
        have = (await again.open(house.digest, session=talk.session, epoch=2)).have
        assert have >= 10
        await house.rest(again, have)
        await again.close()


async def test_a_link_that_passes_nothing_is_noticed_by_an_idle_session(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicker = {"grpc.keepalive_time_ms": 1000, "grpc.http2.ping_timeout_ms": 500}
    options = [(name, quicker.get(name, value)) for name, value in channel_module.CHANNEL_OPTIONS]
    monkeypatch.setattr(channel_module, "CHANNEL_OPTIONS", options)
    async with House.up(bundle) as house:
        talk = await house.opened(held=10)
        house.link.stall()
        assert type(await talk.end()) is Unavailable


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
