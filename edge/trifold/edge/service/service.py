"""The edge: token ids in, rows through the edge's layers and the core, rows out."""

from __future__ import annotations

import asyncio
from time import perf_counter_ns

import numpy as np

from trifold.edge.service.upstream import Core, CoreStream
from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.bundle.manifest import Manifest
from trifold.shared.runtime.shard import Cache, Shard
from trifold.shared.session.frames import Steps
from trifold.shared.session.service import TierService
from trifold.shared.session.stream import Stream, until_first
from trifold.shared.session.table import Seat
from trifold.shared.session.window import Passage, Window

Line = asyncio.Queue[Passage | None]


class EdgeService(TierService):
    """Runs the edge's shard for many devices, with one core behind it.

    A session has a stream on either side, and both end together: a core that is lost ends the device's
    stream, and the device opens the session again.
    """

    name = "trifold.proto.v1.EdgeService"
    takes = "tokens"

    def __init__(self, shard: Shard, manifest: Manifest, core: Core, *, memory: int, lease: float) -> None:
        super().__init__(shard, manifest, memory=memory, lease=lease)
        self._core = core

    async def describe(self) -> pb.DescribeResponse:
        own, behind = await super().describe(), await self._core.describe()
        own.tiers.extend(behind.tiers)
        own.max_rows = min(own.max_rows, behind.max_rows)
        return own

    async def close(self) -> None:
        await super().close()
        await self._core.close()

    async def converse(self, stream: Stream, opening: pb.Open, seat: Seat[Cache]) -> None:
        cache = await seat.cache()
        wanted = self.frames.steps(opening, cache.have).in_flight
        towards_core = pb.Open(
            session=opening.session,
            epoch=opening.epoch,
            serving_digest=opening.serving_digest,
            capacity=opening.capacity,
            steps_in_flight=wanted,
        )
        async with self._core.open(towards_core) as core:
            opened = pb.Opened(
                have=min(cache.have, core.opened.have),
                steps_in_flight=min(wanted, core.opened.steps_in_flight),
                max_rows=min(self.frames.max_rows, core.opened.max_rows),
                lease_ms=min(round(self.table.lease * 1000), core.opened.lease_ms),
                tiers=[self.info, *core.opened.tiers],
            )
            await stream.write(pb.SessionResponse(opened=opened))
            steps = self.frames.steps(opening, opened.have)
            window = Window(opened.steps_in_flight)
            sent: Line = asyncio.Queue()
            await until_first(
                core.lost(),
                self.take(stream, steps, seat, cache, window),
                self._forward(core, window, sent),
                self._answer(core, stream, window, sent),
            )
            if seat.closed:
                await core.close()

    def compute(self, cache: Cache, steps: Steps, step: pb.Step) -> bytes | None:
        if steps.stale(step):
            return None
        header = step.header
        tokens = np.array(step.tokens.ids, np.int64)
        return self.frames.codec.encode(self.shard.run(cache, tokens, header.base_pos), header.base_pos)

    async def _forward(self, core: CoreStream, window: Window, sent: Line) -> None:
        """Sends the rows on as they are computed, while the engine is at the next step already."""
        seq = 0
        while (passage := await window.get()) is not None:
            turn = await passage.turn
            if turn.value is not None:
                header = pb.Header()
                header.CopyFrom(passage.header)
                header.seq = seq
                header.codec = self.frames.codec.wire
                passage.bytes_up = core.send(pb.Step(header=header, rows=turn.value))
                seq += 1
            sent.put_nowait(passage)
        sent.put_nowait(None)

    async def _answer(self, core: CoreStream, stream: Stream, window: Window, sent: Line) -> None:
        seq = 0
        while (passage := await sent.get()) is not None:
            turn = passage.turn.result()
            if turn.value is None:
                passage.header.rows = 0
                response = pb.SessionResponse(result=pb.Result(header=passage.header, stale=True))
            else:
                response, bytes_down = await core.receive()
                self._check(core, response.result, passage.header, seq)
                seq += 1
                response.result.header.seq = passage.header.seq
                response.result.hops.add(
                    tier=self.info.tier,
                    provider=self.info.provider,
                    queue_ns=turn.queue_ns,
                    compute_ns=turn.compute_ns,
                    total_ns=perf_counter_ns() - passage.arrived_ns,
                    bytes_up=passage.bytes_up,
                    bytes_down=bytes_down,
                )
            window.answered()
            await stream.write(response)

    def _check(self, core: CoreStream, result: pb.Result, asked: pb.Header, seq: int) -> None:
        """Raises TrifoldError unless the core answers what it was asked."""
        header = result.header
        first = header.base_pos if result.stale else self.first_wanted(asked)
        rows = 0 if result.stale else asked.base_pos + asked.rows - first
        if (header.seq, header.base_pos, header.rows) != (seq, first, rows):
            raise core.nonsense(f"result {header.seq} where {seq} was expected")
        if len(result.rows) != self.frames.codec.size(rows, first):
            raise core.nonsense(f"{len(result.rows)} bytes for {rows} rows")
