from __future__ import annotations

import asyncio

import pytest

from trifold.device.service.places import Places
from trifold.shared.errors import Overloaded


class Guest:
    """Takes places until it is told to leave."""

    def __init__(self, places: Places, wanted: int = 1) -> None:
        self.seated = asyncio.Event()
        self._leave = asyncio.Event()
        self.task = asyncio.create_task(self._visit(places, wanted))

    async def leave(self) -> None:
        self._leave.set()
        await self.task

    async def _visit(self, places: Places, wanted: int) -> None:
        async with places.taken(wanted):
            self.seated.set()
            await self._leave.wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_places_are_taken_in_the_order_of_coming() -> None:
    places = Places(2, patience=100)
    first, second, large, small = (Guest(places, wanted) for wanted in (1, 1, 2, 1))
    await settle()
    assert (places.running, places.waiting) == (2, 3)
    await first.leave()
    await settle()
    assert not large.seated.is_set()
    assert not small.seated.is_set()  # it does not overtake
    await second.leave()
    await large.leave()
    await small.leave()
    assert (places.running, places.waiting) == (0, 0)


async def test_more_than_there_are_takes_them_all() -> None:
    places = Places(2, patience=100)
    guest = Guest(places, 16)
    await settle()
    assert guest.seated.is_set()
    assert places.running == 2
    await guest.leave()
    assert places.free == 2


async def test_who_would_wait_too_long_is_refused_at_once_and_told_when_to_come() -> None:
    places = Places(1, patience=2.5)  # places are held for a second, as far as anybody knows
    guests = [Guest(places) for _ in range(3)]
    await settle()
    with pytest.raises(Overloaded, match="and 2 wait") as refusal:
        places.check()
    assert refusal.value.retry_after
    with pytest.raises(Overloaded):
        async with places.taken():
            pass
    for guest in guests:
        await guest.leave()
    places.check()


async def test_who_leaves_the_line_as_its_place_becomes_free_harms_nobody() -> None:
    places = Places(1, patience=100)
    seated, waiting, last = (Guest(places) for _ in range(3))
    await settle()
    leaving = asyncio.create_task(seated.leave())
    await asyncio.sleep(0)
    waiting.task.cancel()
    await leaving
    await settle()
    assert last.seated.is_set()
    assert (places.running, places.waiting, places.free) == (1, 0, 0)
    await last.leave()
    assert (places.running, places.waiting, places.free) == (0, 0, 1)


async def test_answers_that_fail_do_not_make_the_line_longer() -> None:
    places = Places(1, patience=2.5)
    for _ in range(100):
        with pytest.raises(ZeroDivisionError):
            async with places.taken():
                raise ZeroDivisionError
    guests = [Guest(places) for _ in range(3)]
    await settle()
    with pytest.raises(Overloaded):
        places.check()
    for guest in guests:
        await guest.leave()


async def test_who_leaves_the_line_loses_nobody_a_place() -> None:
    places = Places(1, patience=100)
    seated, waiting, called, last = (Guest(places) for _ in range(4))
    await settle()
    waiting.task.cancel()
    await settle()
    assert places.waiting == 2
    leaving = asyncio.create_task(seated.leave())
    while places.waiting == 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    called.task.cancel()  # has its place and does not know it yet
    await leaving
    await settle()
    assert last.seated.is_set()
    await last.leave()
    assert (places.running, places.waiting, places.free) == (0, 0, 1)
