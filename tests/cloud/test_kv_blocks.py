"""Paged KV: blocks are reserved, truncated and released, and none is ever lost or given out twice."""

from __future__ import annotations

import asyncio
import gc
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from trifold.cloud.core.kv.blocks import BLOCK, NOBODYS, BlockPool, blocks_of
from trifold.cloud.core.kv.table import BlockTable
from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import Overloaded, StaleEpoch, Unavailable
from trifold.shared.session.scheduler import TurnScheduler
from trifold.shared.session.table import SessionTable


@pytest.mark.parametrize(("positions", "blocks"), [(1, 1), (BLOCK, 1), (BLOCK + 1, 2), (10 * BLOCK, 10)])
def test_a_session_has_the_blocks_that_its_positions_take_and_no_more(positions: int, blocks: int) -> None:
    pool = BlockPool(10)
    table = pool.reserve(positions)
    assert len(table.blocks) == blocks == blocks_of(positions)
    assert pool.free == 10 - blocks
    assert table.capacity == positions


def test_no_block_is_of_two_sessions_and_none_of_them_has_nobodys() -> None:
    pool = BlockPool(100)
    tables = [pool.reserve(BLOCK * count) for count in (1, 5, 30, 64)]
    given = sorted(block for table in tables for block in table.blocks)
    assert all(one < other for one, other in pairwise(given))
    assert NOBODYS not in given
    assert pool.free == 0


def test_who_asks_for_more_than_is_free_gets_nothing_and_takes_nothing() -> None:
    pool = BlockPool(3)
    table = pool.reserve(2 * BLOCK)
    with pytest.raises(Overloaded, match="2 blocks of KV, 1 are free"):
        pool.reserve(BLOCK + 1)
    assert pool.free == 1
    table.release()
    assert pool.reserve(3 * BLOCK).capacity == 3 * BLOCK


def test_truncating_forgets_positions_but_keeps_the_blocks() -> None:
    pool = BlockPool(4)
    table = pool.reserve(4 * BLOCK)
    table.have = 200
    table.truncate(70)
    assert (table.have, pool.free) == (70, 0)
    table.truncate(100)
    assert table.have == 70


def test_blocks_come_back_once_however_often_a_table_is_released() -> None:
    pool = BlockPool(4)
    table = pool.reserve(BLOCK)
    assert not table.released
    table.release()
    table.release()
    del table
    assert pool.free == 4
    tables = [pool.reserve(BLOCK) for _ in range(4)]
    assert len({table.blocks for table in tables}) == 4


def test_a_table_that_everybody_has_forgotten_gives_its_blocks_back() -> None:
    pool = BlockPool(2)
    table = pool.reserve(2 * BLOCK)
    assert pool.free == 0
    del table
    gc.collect()
    assert pool.free == 2


def test_threads_that_reserve_and_release_lose_no_block() -> None:
    pool = BlockPool(64)

    def many(seed: int) -> int:
        rng, held, refused = random.Random(seed), list[BlockTable](), 0
        for _ in range(2_000):
            if held and rng.random() < 0.5:
                held.pop(rng.randrange(len(held))).release()
            else:
                try:
                    held.append(pool.reserve(rng.randint(1, 6 * BLOCK)))
                except Overloaded:
                    refused += 1
            blocks = [block for table in held for block in table.blocks]
            assert len(set(blocks)) == len(blocks)
        for table in held:
            table.release()
        return refused

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(many, range(4))) > 0
    assert pool.free == 64
    assert sorted(pool.reserve(64 * BLOCK).blocks) == [*range(1, 65)]


class Paged:
    """Makes caches as an engine does: in a turn, of a pool."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool

    def cache_bytes(self, capacity: int) -> int:
        return blocks_of(capacity)

    def cache(self, capacity: int) -> BlockTable:
        return self.pool.reserve(capacity)

    def release(self, cache: BlockTable) -> None:
        cache.release()


async def test_ten_thousand_sessions_opened_cancelled_and_expired_leak_no_block() -> None:
    pool, scheduler, rng = BlockPool(256), TurnScheduler(), random.Random(0)
    table = SessionTable[BlockTable](Paged(pool), scheduler, memory=256, streams=64, lease=0.01)

    async def session(number: int) -> str:
        opening = pb.Open(session=number.to_bytes(16, "big"), epoch=1, capacity=rng.randint(1, 4 * BLOCK))
        ending = rng.choice(["closed", "lost", "lost early", "taken over", "failed"])
        try:
            with table.seat(opening) as seat:
                made = asyncio.ensure_future(seat.cache())
                if ending == "lost early":
                    await asyncio.sleep(0)
                    raise Unavailable("its stream broke off while the cache was made")
                cache = await made
                cache.have = rng.randint(1, opening.capacity)
                if ending == "taken over":
                    opening.epoch = 2
                    with table.seat(opening) as later:
                        await later.cache()
                        later.closed = True
                    raise StaleEpoch("another stream has the session")
                if ending == "lost":
                    raise Unavailable("its stream broke off")
                if ending == "failed":
                    raise ValueError("the engine failed")
                seat.closed = True
        except (Unavailable, StaleEpoch, ValueError):
            pass
        return ending

    for start in range(0, 10_000, 50):
        endings = await asyncio.gather(*map(session, range(start, start + 50)), return_exceptions=True)
        # The pool has room for 50 sessions that run, and now and then not for those on their lease besides.
        assert all(isinstance(ending, str | Overloaded) for ending in endings)
        while len(table):  # noqa: ASYNC110 - the table has no event for a test
            await asyncio.sleep(0.002)
    assert table.reserved == 0
    scheduler.stop()
    gc.collect()
    assert pool.free == 256
