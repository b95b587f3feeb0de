"""The rows of batches that the training process holds for its sites: within a budget of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cloud.cores import settled
from tests.cloud.trainings import running_training, some
from tests.shared.sites import train_bundle
from trifold.shared.errors import InvalidRequest, Overloaded

BATCH = 2 * (4 * 2 * 64 + 4 * 68)
"""Bytes of the rows of a batch in int8."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bundle("deepseek_v3", tmp_path_factory.mktemp("train"))[1]


async def test_rows_are_held_within_a_budget_and_the_site_that_holds_most_gives_way(bundle: Path) -> None:
    async with running_training(bundle, row_memory=3 * BATCH) as training:
        modest, greedy = await training.opened(), await training.opened()
        await modest.forward(some(training.codec))
        for number in range(4):
            await greedy.forward(some(training.codec, number), number)
            told = await training.describe()
            assert told.row_bytes <= told.row_bytes_limit == 3 * BATCH
        assert told.row_bytes == 3 * BATCH
        assert not (await modest.backward(some(training.codec)))[0].forgotten
        answers = [(await greedy.backward(some(training.codec), number))[0] for number in range(4)]
        assert [answer.forgotten for answer in answers] == [True, True, False, False]
        assert (await training.describe()).row_bytes == 0
        await modest.close()
        await greedy.close()


async def test_a_lost_site_gives_way_and_one_that_waits_for_its_gradients_does_not(bundle: Path) -> None:
    async with running_training(bundle, row_memory=3 * BATCH) as training:
        lost, *others = [await training.opened() for _ in range(3)]
        for talk in (lost, *others):
            await talk.forward(some(training.codec))
        late = await training.opened()
        with pytest.raises(Overloaded, match="other sites' batches come first"):
            await late.forward(some(training.codec))
        lost.drop()
        await settled(lambda: any(site.seat is None for site in training.service.table._sites.values()))
        late = await training.opened()
        await late.forward(some(training.codec))
        # A site makes room for itself, or all could wait for one another.
        await late.forward(some(training.codec, 2), 2)
        answers = [(await late.backward(some(training.codec), number))[0] for number in (1, 2)]
        assert [answer.forgotten for answer in answers] == [True, False]
        found = await training.opened(session=lost.session)
        assert (await found.backward(some(training.codec)))[0].forgotten
        for talk in others:
            assert not (await talk.backward(some(training.codec)))[0].forgotten


async def test_a_site_that_is_turned_away_for_want_of_room_keeps_what_it_has(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(size: int, asking: object) -> None:
        raise Overloaded("full", retry_after=1)

    async with running_training(bundle) as training:
        talk = await training.opened()
        await talk.forward(some(training.codec))
        with monkeypatch.context() as patch:
            patch.setattr(training.service.table, "make_room", full)
            with pytest.raises(Overloaded, match="full"):
                await talk.forward(some(training.codec, 2), 2)
        again = await training.opened(session=talk.session)
        assert not (await again.backward(some(training.codec)))[0].forgotten
        await again.close()


async def test_a_batch_has_as_many_rows_as_the_budget_has_room_for(bundle: Path) -> None:
    async with running_training(bundle, row_memory=4 * 64 * 20) as training:
        talk = training.call()
        assert (await talk.open()).max_rows == 20
        await talk.forward(some(training.codec, sequences=1, length=20))
        with pytest.raises(InvalidRequest, match="a sequence has 1 to 20, all together 20 at most"):
            await talk.forward(some(training.codec, sequences=1, length=21), 2)
