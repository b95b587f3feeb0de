"""Sessions that begin alike: what one has computed another need not, and nobody else learns of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cloud.cores import codec_of, digest_of, expected, some_rows
from tests.tiers import RunningCore, engine, running_core
from tests.wire import Peer, Talk, decoded
from trifold.cloud.core.engines.engine import Part
from trifold.cloud.core.kv.blocks import BLOCK
from trifold.cloud.core.prefixes import Prefix, Prefixes
from trifold.shared.runtime.codec import Rows

CAPACITY = 256
LENGTH = 3 * BLOCK + 10
MEMORY = 64 * 1024**2


@pytest.fixture
async def core(bundle: Path) -> AsyncIterator[RunningCore]:
    async with running_core(bundle, prefix_memory=MEMORY) as core:
        yield core


@pytest.fixture
def computed(core: RunningCore, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each batch that the engine has had."""
    batches: list[int] = []
    run = engine(core.bundle).run

    def counted(batch: Sequence[Part[Any]]) -> list[Rows]:
        batches.append(sum(len(part.rows) for part in batch))
        return run(batch)

    monkeypatch.setattr(engine(core.bundle), "run", counted)
    return batches


async def answers(core: RunningCore, peer: Peer, rows: Rows, *steps: int) -> tuple[Rows, Talk]:
    """What a new session gets for the rows, sent in steps that begin at these positions."""
    codec, talk = codec_of(core), peer.call()
    await talk.open(digest_of(core), capacity=CAPACITY)
    got = []
    for start, stop in zip((0, *steps), (*steps, len(rows)), strict=True):
        await talk.send_rows(codec, rows[start:stop], start)
        got.append(decoded(codec, await talk.result()))
    return np.concatenate(got), talk


@pytest.mark.parametrize("steps", [(), (BLOCK,), (50, 120), (10, 20, 30, 180)])
async def test_a_second_session_gets_the_same_bits_and_computes_what_is_left(
    core: RunningCore, peer: Peer, computed: list[int], steps: tuple[int, ...]
) -> None:
    rows = some_rows(core, 1, LENGTH)
    first, _ = await answers(core, peer, rows)
    assert np.array_equal(first, expected(core, rows))
    computed.clear()
    second, talk = await answers(core, peer, rows, *steps)
    assert np.array_equal(second, first)
    assert sum(computed) < LENGTH - BLOCK
    more = some_rows(core, 2, 5)
    await talk.send_rows(codec_of(core), more, LENGTH)
    both = expected(core, np.concatenate([rows, more]))
    assert np.array_equal(decoded(codec_of(core), await talk.result()), both[LENGTH:])


async def test_where_two_part_each_goes_its_own_way(
    core: RunningCore, peer: Peer, computed: list[int]
) -> None:
    rows, other = some_rows(core, 1, LENGTH), some_rows(core, 1, LENGTH)
    other[2 * BLOCK - 1] += 1
    await answers(core, peer, rows)
    computed.clear()
    got, _ = await answers(core, peer, other)
    assert np.array_equal(got, expected(core, other))
    assert sum(computed) == LENGTH - BLOCK
    computed.clear()
    assert np.array_equal((await answers(core, peer, rows))[0], expected(core, rows))
    assert sum(computed) == LENGTH - 3 * BLOCK


async def test_a_prompt_of_whole_blocks_that_is_known_is_not_computed_at_all(
    core: RunningCore, peer: Peer, computed: list[int]
) -> None:
    rows = some_rows(core, 1, 2 * BLOCK)
    first, _ = await answers(core, peer, rows)
    computed.clear()
    second, talk = await answers(core, peer, rows)
    assert np.array_equal(second, first)
    assert computed == []
    await talk.close()


async def test_rows_that_were_taken_back_are_offered_to_nobody(
    core: RunningCore, peer: Peer, computed: list[int]
) -> None:
    """A session goes back behind what it has offered, and on from there with other rows."""
    codec, rows, other = codec_of(core), some_rows(core, 1, CAPACITY), some_rows(core, 2, CAPACITY)
    _, talk = await answers(core, peer, rows[:LENGTH])
    mixed = np.concatenate([rows[:100], other[100 : 3 * BLOCK], rows[3 * BLOCK :]])
    for start, stop in ((100, 3 * BLOCK), (3 * BLOCK, CAPACITY)):
        await talk.send_rows(codec, mixed[start:stop], start)
        await talk.result()
    for wanted in (rows, mixed):
        assert np.array_equal((await answers(core, peer, wanted))[0], expected(core, wanted))


def test_without_memory_or_of_an_engine_that_is_not_exact_nothing_is_shared(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = engine(bundle)
    assert Prefixes(own, MEMORY).begin("", own.cache(CAPACITY))
    assert Prefixes(own, 1).begin("", own.cache(CAPACITY)) is None
    monkeypatch.setattr(own, "exact", False)
    assert Prefixes(own, MEMORY).begin("", own.cache(CAPACITY)) is None


def extended(prefixes: Prefixes, rows: Rows, tenant: str = "") -> tuple[Prefix, int]:
    """A session of these rows, and how many of them were known."""
    own: Any = prefixes.engine
    cache = own.cache(CAPACITY)
    prefix = prefixes.begin(tenant, cache)
    assert prefix
    found = prefix.find(rows, 0)
    if len(found) < len(rows):
        (got,) = own.run([Part(cache, rows[len(found) :], len(found))])
        prefix.add(rows[len(found) :], len(found), got)
    return prefix, len(found)


def prompts(bundle: Path, count: int) -> list[Rows]:
    hidden = engine(bundle).hidden
    return [np.random.default_rng(n).standard_normal((2 * BLOCK, hidden), np.float32) for n in range(count)]


def test_other_tenants_have_nothing_of_it(bundle: Path) -> None:
    prefixes = Prefixes(engine(bundle), MEMORY)
    (rows,) = prompts(bundle, 1)
    assert extended(prefixes, rows, "alice")[1] == 0
    assert extended(prefixes, rows, "bob")[1] == 0
    assert extended(prefixes, rows, "alice")[1] == 2 * BLOCK


def test_what_was_of_use_last_is_kept_and_its_beginning_longest(bundle: Path) -> None:
    own = engine(bundle)
    first, second, third = prompts(bundle, 3)
    cache = own.cache(BLOCK)
    own.run([Part(cache, first[:BLOCK], 0)])
    block = sum(kept.nbytes for kept in own.copy_block(cache, 0)) + first[:BLOCK].nbytes
    assert Prefixes(own, 3 * block - 1)._most == 2
    prefixes = Prefixes(own, 3 * block)
    extended(prefixes, first)
    extended(prefixes, second[:BLOCK])
    assert extended(prefixes, first)[1] == 2 * BLOCK
    extended(prefixes, third[:BLOCK])
    assert extended(prefixes, first)[1] == 2 * BLOCK
    extended(prefixes, second)
    assert extended(prefixes, first)[1] == BLOCK


def test_a_draft_is_offered_when_the_block_behind_it_is_full(bundle: Path) -> None:
    own = engine(bundle)
    prefixes = Prefixes(own, MEMORY)
    (rows,) = prompts(bundle, 1)
    cache = own.cache(CAPACITY)
    prefix = prefixes.begin("", cache)
    assert prefix
    for start in range(0, 2 * BLOCK, 4):
        assert extended(prefixes, rows[: BLOCK - 1])[1] == 0
        drafted = rows[start : start + 4]
        prefix.find(drafted, start)
        (got,) = own.run([Part(cache, drafted, start)])
        prefix.add(drafted, start, got)
    assert extended(prefixes, rows)[1] == BLOCK
