from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

from trifold.shared.session.scheduler import TurnScheduler


@pytest.fixture
def scheduler() -> Iterator[TurnScheduler]:
    scheduler = TurnScheduler()
    yield scheduler
    scheduler.stop()


class Gate:
    """Work that holds the engine until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self.opened.wait(10)


async def test_a_turn_brings_its_value_and_its_times(scheduler: TurnScheduler) -> None:
    turn = await scheduler.run("a", lambda: 7)
    assert turn.value == 7
    assert turn.queue_ns >= 0
    assert turn.compute_ns > 0


async def test_sessions_take_turns_a_step_each(scheduler: TurnScheduler) -> None:
    gate, order = Gate(), list[str]()
    first = scheduler.run("gate", gate)
    turns = [
        scheduler.run(key, partial(order.append, f"{key}{number}")) for key in "abc" for number in range(3)
    ]
    gate.opened.set()
    await asyncio.gather(first, *turns)
    assert order == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "b2", "c2"]


async def test_one_who_comes_late_does_not_wait_for_all_of_a_long_line(scheduler: TurnScheduler) -> None:
    gate, order = Gate(), list[str]()
    turns = [scheduler.run("long", gate)]
    turns += [scheduler.run("long", lambda: order.append("long")) for _ in range(10)]
    turns.append(scheduler.run("late", lambda: order.append("late")))
    gate.opened.set()
    await asyncio.gather(*turns)
    assert order.index("late") <= 1


async def test_work_never_runs_beside_other_work(scheduler: TurnScheduler) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        threading.Event().wait(0.001)
        inside -= 1

    await asyncio.gather(*(scheduler.run(key, work) for key in range(20)))
    assert most == 1


async def test_an_error_reaches_the_one_who_asked_and_the_engine_goes_on(scheduler: TurnScheduler) -> None:
    def fail() -> None:
        raise ZeroDivisionError("once")

    with pytest.raises(ZeroDivisionError, match="once"):
        await scheduler.run("a", fail)
    assert (await scheduler.run("a", lambda: 1)).value == 1


async def test_a_forgotten_line_is_not_computed_and_others_are(scheduler: TurnScheduler) -> None:
    gate, done = Gate(), list[str]()
    running = scheduler.run("a", gate)
    waiting = scheduler.run("a", lambda: done.append("a"))
    other = scheduler.run("b", lambda: done.append("b"))
    await asyncio.to_thread(gate.entered.wait)
    scheduler.forget("a")
    gate.opened.set()
    await other
    assert running.cancelled()
    assert waiting.cancelled()
    assert done == ["b"]


async def test_the_engine_keeps_nothing_of_what_it_ran(scheduler: TurnScheduler) -> None:
    array = np.zeros(4)
    alive = weakref.ref(array)
    await scheduler.run("a", partial(np.sum, array))
    del array
    gc.collect()
    assert alive() is None


async def test_one_who_is_alone_gets_small_turns_without_changing_threads(
    scheduler: TurnScheduler,
) -> None:
    async def thread(key: str, *, small: bool = True) -> str:
        turn = await scheduler.run(key, lambda: threading.current_thread().name, small=small)
        return turn.value

    here = threading.current_thread().name
    assert [await thread("a") for _ in range(3)] == ["engine", here, here]
    assert await thread("a", small=False) == "engine"
    # Two who take turns leave the event loop free to talk with one while it computes for the other.
    assert [await thread(key) for key in "bab"] == ["engine"] * 3


async def test_small_turns_that_are_not_brief_are_left_to_the_engine(scheduler: TurnScheduler) -> None:
    def slow() -> str:
        threading.Event().wait(0.01)
        return threading.current_thread().name

    names = [(await scheduler.run("a", slow, small=True)).value for _ in range(3)]
    assert names == ["engine"] * 3


async def test_an_error_in_a_turn_of_one_who_is_alone_is_an_error_like_any_other(
    scheduler: TurnScheduler,
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("once")

    for _ in range(2):
        await scheduler.run("a", lambda: None, small=True)
    with pytest.raises(ZeroDivisionError, match="once"):
        await scheduler.run("a", fail, small=True)


async def test_nothing_runs_beside_a_turn_whose_line_was_forgotten(scheduler: TurnScheduler) -> None:
    gate, done = Gate(), list[str]()
    await scheduler.run("a", lambda: None, small=True)
    scheduler.run("a", gate)
    await asyncio.to_thread(gate.entered.wait)
    scheduler.forget("a")
    late = scheduler.run("a", lambda: done.append("late"), small=True)
    assert done == []
    gate.opened.set()
    await late
    assert done == ["late"]


async def test_a_stopped_scheduler_drops_what_waits() -> None:
    scheduler, gate = TurnScheduler(), Gate()
    running = scheduler.run("a", gate)
    waiting = scheduler.run("b", lambda: None)
    await asyncio.to_thread(gate.entered.wait)
    scheduler.stop()  # does not wait for the one that runs
    gate.opened.set()
    await running
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_failure_that_nobody_waits_for_any_more_is_no_complaint(scheduler: TurnScheduler) -> None:
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))

    def fail() -> None:
        raise ValueError("a step behind one that was wrong")

    future = scheduler.run("a", fail)
    await asyncio.wait([future])
    del future
    gc.collect()
    assert not complaints
