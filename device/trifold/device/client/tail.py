"""The device's own part of the model: from rows to the committed token."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Executor
from dataclasses import dataclass

from trifold.device.client.journal import Journal
from trifold.device.client.stream import Delivery
from trifold.device.client.trace import Work
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.runtime.monolith import row_digest
from trifold.shared.runtime.sampling import Logprobs, logprobs, pick
from trifold.shared.runtime.shard import Shard


@dataclass(frozen=True)
class Decision:
    """A committed token, its position, the digest of the row that predicted it, and logprobs if asked for."""

    token: int
    position: int
    row_digest: str
    logprobs: Logprobs | None


class Tail:
    """Runs the device shard over the rows of one generation, samples, and commits to the journal.

    A shard with attention layers takes every row into its own KV cache; one without takes those whose logits
    are needed. Chunks are worked on by `engine`, so that the event loop goes on with the streams meanwhile.
    """

    def __init__(self, shard: Shard, codec: RowCodec, journal: Journal, engine: Executor) -> None:
        self._shard = shard
        self._codec = codec
        self._journal = journal
        self._engine = engine
        self._cache = shard.cache(journal.request.capacity)

    @property
    def needed(self) -> int:
        """The first position whose row has not been used."""
        last = len(self._journal.ids) - 1
        return min(self._cache.have, last) if self._shard.attends else last

    async def work(self, delivery: Delivery) -> tuple[Work, Decision | None]:
        """Uses the rows; decides when they reach the last token, whose row predicts the next one."""
        asked = time.monotonic_ns()
        # Handing a single row to another thread and back would take about as long as its work.
        if delivery.rows <= 1:
            return self._work(delivery, asked)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._engine, self._work, delivery, asked)

    def _work(self, delivery: Delivery, asked: int) -> tuple[Work, Decision | None]:
        began = time.monotonic_ns()
        decision = self._decide(delivery) if delivery.rows else None
        done = time.monotonic_ns()
        return Work(delivery, self._shard.provider, began - asked, done - began, done), decision

    def _decide(self, delivery: Delivery) -> Decision | None:
        rows = self._codec.decode(delivery.data, delivery.rows, delivery.base_pos)
        position = len(self._journal.ids)
        logits_from = min(delivery.end, position - 1)
        logits = self._shard.run(self._cache, rows, delivery.base_pos, logits_from)
        if delivery.end < position:
            return None
        request = self._journal.request
        token = pick(logits[-1], request.sampling, position)
        self._journal.commit(token)
        told = None
        if request.logprobs is not None and token not in request.eos:
            told = logprobs(logits[-1], token, request.logprobs)
        return Decision(token, position, row_digest(rows[-1]), told)
