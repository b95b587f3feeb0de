"""The core: rows in, rows through the cloud's layers, rows out."""

from __future__ import annotations

from time import perf_counter_ns

from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.runtime.shard import Cache
from trifold.shared.session.frames import Steps
from trifold.shared.session.scheduler import Turn
from trifold.shared.session.service import TierService
from trifold.shared.session.stream import Stream, until_first
from trifold.shared.session.table import Seat
from trifold.shared.session.window import Passage, Window


class CoreService(TierService):
    """Runs the cloud's shard for many edges and sessions."""

    name = "trifold.proto.v1.CoreService"
    takes = "rows"

    async def converse(self, stream: Stream, opening: pb.Open, seat: Seat[Cache]) -> None:
        cache = await seat.cache()
        steps = self.frames.steps(opening, cache.have)
        opened = pb.Opened(
            have=cache.have,
            steps_in_flight=steps.in_flight,
            max_rows=self.frames.max_rows,
            lease_ms=round(self.table.lease * 1000),
            tiers=[self.info],
        )
        await stream.write(pb.SessionResponse(opened=opened))
        window = Window(steps.in_flight)
        await until_first(self.take(stream, steps, seat, cache, window), self._answer(stream, window))

    def compute(self, cache: Cache, steps: Steps, step: pb.Step) -> bytes | None:
        if steps.stale(step):
            return None
        header, codec = step.header, self.frames.codec
        rows = codec.decode(step.rows, header.rows, header.base_pos)
        out = self.shard.run(cache, rows, header.base_pos)
        first = self.first_wanted(header)
        return codec.encode(out[first - header.base_pos :], first)

    async def _answer(self, stream: Stream, window: Window) -> None:
        while (passage := await window.get()) is not None:
            turn = await passage.turn
            window.answered()
            await stream.write(pb.SessionResponse(result=self._result(passage, turn)))

    def _result(self, passage: Passage, turn: Turn[bytes | None]) -> pb.Result:
        header = passage.header
        first = self.first_wanted(header)
        rows = 0 if turn.value is None else header.base_pos + header.rows - first
        hop = pb.Hop(
            tier=self.info.tier,
            provider=self.info.provider,
            queue_ns=turn.queue_ns,
            compute_ns=turn.compute_ns,
            total_ns=perf_counter_ns() - passage.arrived_ns,
        )
        header.codec = self.frames.codec.wire
        header.base_pos = first
        header.rows = rows
        return pb.Result(header=header, rows=turn.value or b"", stale=turn.value is None, hops=[hop])
