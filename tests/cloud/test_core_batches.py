"""Sessions of a core share its batches, and notice nothing of each other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from tests.cloud.cores import codec_of, expected, opened, settled, some_rows
from tests.tiers import RunningCore, engine
from tests.wire import Peer, Talk, decoded
from trifold.cloud.core.batching import BUDGET
from trifold.cloud.core.engines.engine import Part
from trifold.cloud.core.engines.onnxruntime.attention import Cache
from trifold.cloud.core.service import CoreConversation
from trifold.shared.errors import BadRows, TrifoldError
from trifold.shared.runtime.codec import Rows
from trifold.shared.session.frames import Steps

LONG = 250
CAPACITY = 256


class Watch:
    """The core's engine, which notes the rows of each part of its batches, and can be held."""

    def __init__(self, run: Callable[[Sequence[Part[Cache]]], list[Rows]]) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()
        self.fail_at = 0
        self._run = run

    def __call__(self, batch: Sequence[Part[Cache]]) -> list[Rows]:
        self.batches.append([len(part.rows) for part in batch])
        assert self.go.wait(20)
        if self.fail_at in self.batches[-1]:
            raise ZeroDivisionError("a secret of the house")
        return self._run(batch)


@pytest.fixture
def watch(core: RunningCore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    watch = Watch(engine(core.bundle).run)
    monkeypatch.setattr(engine(core.bundle), "run", watch)
    yield watch
    watch.go.set()


async def held_up(core: RunningCore, watch: Watch, first: Talk, at: int = 1) -> None:
    """The engine is at the next row of `first`, and goes no further until it may."""
    begun = len(watch.batches)
    watch.go.clear()
    # Two steps: one of a session that is alone might be computed in the event loop of this test.
    await first.send_rows(codec_of(core), some_rows(core)[at : at + 2], at)
    await settled(lambda: len(watch.batches) > begun)


async def waiting(core: RunningCore, sessions: int) -> None:
    await settled(lambda: core.service.scheduler.waiting == sessions)


def steps_of(core: RunningCore, talk: Talk) -> Steps:
    """The steps of a stream, as the core has checked them so far."""
    seat = core.service.table._sessions["", talk.session].seat
    assert seat
    conversation = seat.idle.__self__  # type: ignore[attr-defined]
    assert isinstance(conversation, CoreConversation)
    return conversation.steps


async def test_what_comes_while_the_engine_works_is_one_batch(
    core: RunningCore, peer: Peer, watch: Watch
) -> None:
    codec, rows = codec_of(core), some_rows(core)
    talks = [await opened(core, peer, held=1) for _ in range(6)]
    first, *others = talks
    await held_up(core, watch, first)
    for number, talk in enumerate(others):
        await talk.send_rows(codec, rows[1 : 2 + number], 1)
    await waiting(core, len(others))
    watch.go.set()
    for number, talk in enumerate(others):
        answer = decoded(codec, await talk.result())
        assert np.array_equal(answer, expected(core, rows)[1 : 2 + number])
    assert sorted(watch.batches[-1]) == [1, 2, 3, 4, 5]


async def test_a_long_prompt_is_computed_in_pieces_and_tokens_go_between(
    core: RunningCore, peer: Peer, watch: Watch
) -> None:
    codec, rows, prompt = codec_of(core), some_rows(core), some_rows(core, 1, LONG)
    first, token = await opened(core, peer, held=1), await opened(core, peer, held=1)
    long = await opened(core, peer, capacity=CAPACITY)
    await held_up(core, watch, first)
    await long.send_rows(codec, prompt, 0)
    await token.send_rows(codec, rows[1:2], 1)
    await waiting(core, 2)
    watch.go.set()
    assert np.array_equal(decoded(codec, await long.result()), expected(core, prompt))
    assert np.array_equal(decoded(codec, await token.result()), expected(core, rows)[1:2])
    assert watch.batches[-2:] == [[1, BUDGET - 1], [LONG - BUDGET + 1]]


async def test_a_prompt_whose_session_is_gone_is_not_computed_to_its_end(
    core: RunningCore, peer: Peer, watch: Watch
) -> None:
    codec, prompt = codec_of(core), some_rows(core, 1, LONG)
    long = await opened(core, peer, capacity=CAPACITY)
    watch.go.clear()
    await long.send_rows(codec, prompt, 0)
    await settled(lambda: watch.batches[-1:] == [[BUDGET]])
    await long.drop()
    await settled(lambda: core.service.table.seated == 0)
    watch.go.set()
    assert (await opened(core, peer, held=1)).session
    assert watch.batches[1:] == [[1]]


async def test_a_batch_that_fails_is_computed_apart_and_ends_the_one_who_is_to_blame(
    core: RunningCore, peer: Peer, watch: Watch
) -> None:
    codec, rows = codec_of(core), some_rows(core)
    first, guilty, innocent = [await opened(core, peer, held=1) for _ in range(3)]
    await held_up(core, watch, first)
    await guilty.send_rows(codec, rows[1:6], 1)
    await innocent.send_rows(codec, rows[1:4], 1)
    await waiting(core, 2)
    watch.fail_at = 5
    watch.go.set()
    assert np.array_equal(decoded(codec, await innocent.result()), expected(core, rows)[1:4])
    assert type(await guilty.end()) is TrifoldError


async def test_what_follows_a_bad_frame_does_not_break_the_batch_of_others(
    core: RunningCore, peer: Peer, watch: Watch
) -> None:
    codec, rows = codec_of(core), some_rows(core)
    first, bad, *others = [await opened(core, peer, held=5) for _ in range(4)]
    await held_up(core, watch, first, at=5)
    size = codec.size(1, 5)
    await bad.say(bad.step(5, 1, rows_data=b"\xff" * size, codec=codec.wire))
    for position in range(6, 9):
        await bad.send_rows(codec, rows[position : position + 1], position)
    for talk in others:
        await talk.send_rows(codec, rows[5:6], 5)
    await waiting(core, 3)
    watch.go.set()
    for talk in others:
        assert np.array_equal(decoded(codec, await talk.result()), expected(core, rows)[5:6])
    assert type(await bad.end()) is BadRows
    assert watch.batches[-1] == [1, 1]


async def test_a_step_of_a_branch_that_was_given_up_is_not_in_the_batch(
    core: RunningCore, peer: Peer, watch: Watch
) -> None:
    codec, rows = codec_of(core), some_rows(core)
    first, drafting = await opened(core, peer, held=1), await opened(core, peer, held=1)
    await held_up(core, watch, first)
    await drafting.send_rows(codec, rows[1:5], 1, branch=0)
    await drafting.send_rows(codec, rows[1:3], 1, branch=1)
    await settled(lambda: steps_of(core, drafting).branch == 1)
    watch.go.set()
    assert (await drafting.result()).stale
    assert np.array_equal(decoded(codec, await drafting.result()), expected(core, rows)[1:3])
    assert watch.batches[-1] == [2]
