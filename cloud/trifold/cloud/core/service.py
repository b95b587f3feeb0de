"""The core: rows in, rows through the cloud's layers, rows out."""

from __future__ import annotations

from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.runtime.shard import Cache
from trifold.shared.session.conversation import Conversation
from trifold.shared.session.frames import Steps
from trifold.shared.session.scheduler import Turn
from trifold.shared.session.service import TierService
from trifold.shared.session.stream import Stream
from trifold.shared.session.table import Seat
from trifold.shared.session.window import Passage
from trifold.shared.telemetry import metrics


class CoreService(TierService):
    """Runs the cloud's shard for many edges and sessions."""

    name = "trifold.proto.v1.CoreService"
    link = "edge-cloud"
    takes = "rows"
    counted = metrics.CORE

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
        await CoreConversation(self, stream, seat, cache, steps).run()


class CoreConversation(Conversation):
    """An edge's rows through the core."""

    def __init__(
        self, core: CoreService, stream: Stream, seat: Seat[Cache], cache: Cache, steps: Steps
    ) -> None:
        super().__init__(stream, seat, cache, steps, core.scheduler)
        self._core = core
        self._codec = core.frames.codec

    def compute(self, step: pb.Step) -> bytes:
        header = step.header
        rows = self._codec.decode(step.rows, header.rows, header.base_pos)
        out = self._core.shard.run(self.cache, rows, header.base_pos)
        first = self._core.first_wanted(header)
        return self._codec.encode(out[first - header.base_pos :], first)

    async def pass_on(self, passage: Passage) -> None:
        turn = await passage.turn
        self.window.answered()
        await self.stream.write(pb.SessionResponse(result=self._result(passage, turn)))

    def _result(self, passage: Passage, turn: Turn[bytes | None]) -> pb.Result:
        header = passage.header
        first = self._core.first_wanted(header)
        hop = self.hop(passage, turn, self._core.info)
        header.codec = self._codec.wire
        header.rows = 0 if turn.value is None else header.base_pos + header.rows - first
        header.base_pos = first
        return pb.Result(header=header, rows=turn.value or b"", stale=turn.value is None, hops=[hop])
