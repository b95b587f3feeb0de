"""The core: rows in, rows through the cloud's layers, rows out."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from trifold.cloud.core.engines.engine import Cache, Engine, Part
from trifold.cloud.core.prefixes import Prefixes
from trifold.cloud.core.scheduler import BatchScheduler, RowJob
from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.bundle.manifest import Manifest
from trifold.shared.runtime.shard import Rows
from trifold.shared.session.conversation import Conversation
from trifold.shared.session.frames import Steps
from trifold.shared.session.scheduler import Turn
from trifold.shared.session.service import TierService
from trifold.shared.session.stream import Stream
from trifold.shared.session.table import Seat
from trifold.shared.session.window import Encoded, Passage
from trifold.shared.telemetry import metrics


class CoreService(TierService):
    """Runs the cloud's layers for many edges and sessions, whose rows are computed together."""

    name = "trifold.proto.v1.CoreService"
    link = "edge-cloud"
    takes = "rows"
    counted = metrics.CORE

    def __init__(
        self,
        engine: Engine[Any],
        manifest: Manifest,
        *,
        memory: int,
        streams: int,
        lease: float,
        prefix_memory: int = 0,
    ) -> None:
        """As for every tier; `prefix_memory` bytes are for what sessions may have of each other."""
        scheduler = BatchScheduler(engine)
        super().__init__(engine, scheduler, manifest, memory=memory, streams=streams, lease=lease)
        self.prefixes = Prefixes(engine, prefix_memory)

    async def converse(self, stream: Stream, opening: pb.Open, seat: Seat[Any]) -> None:
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
        self, core: CoreService, stream: Stream, seat: Seat[Any], cache: Cache, steps: Steps
    ) -> None:
        super().__init__(stream, seat, steps)
        self.core = core
        self.cache = cache
        self.prefix = core.prefixes.begin(stream.tenant, cache)

    def submit(self, step: pb.Step) -> asyncio.Future[Turn[Encoded | None]]:
        return self.core.scheduler.put(CoreStep(self, step))

    async def pass_on(self, passage: Passage) -> None:
        turn = await passage.turn
        self.window.answered()
        await self.stream.write(pb.SessionResponse(result=self._result(passage, turn)))

    def _result(self, passage: Passage, turn: Turn[Encoded | None]) -> pb.Result:
        header = passage.header
        first = self.core.first_wanted(header)
        hop = self.hop(passage, turn, self.core.info)
        header.codec = self.core.frames.codec.wire
        header.rows = 0 if turn.value is None else header.base_pos + header.rows - first
        header.base_pos = first
        return pb.Result(
            header=header, rows=turn.value.rows if turn.value else b"", stale=turn.value is None, hops=[hop]
        )


class CoreStep(RowJob[Encoded | None]):
    """A step of rows: decoded when its first batch begins, and encoded when all of them are back."""

    def __init__(self, conversation: CoreConversation, step: pb.Step) -> None:
        super().__init__(conversation.seat, conversation.stream.tenant, step.header.rows)
        self._conversation = conversation
        self._codec = conversation.core.frames.codec
        self._step = step
        # What the device wants to see; its header is rewritten for the answer.
        self._base_pos = step.header.base_pos
        self._first = conversation.core.first_wanted(step.header)
        self._rows: Rows | None = None
        self._out: list[Rows] = []
        self._reused = 0

    def part(self) -> Part[Any] | None:
        if self._conversation.steps.stale(self._step):
            return None
        prefix = self._conversation.prefix
        if self._rows is None:
            self._rows = self._codec.decode(self._step.rows, self.rows, self._base_pos)
            if prefix and len(found := prefix.find(self._rows, self._base_pos)):
                self._out.append(found)
                self.had = self._reused = len(found)
                self.granted = min(self.granted, self.rows - self.had)
        rows = self._rows[self.had : self.had + self.granted]
        return Part(self._conversation.cache, rows, self._base_pos + self.had)

    def take(self, rows: Rows) -> None:
        self._out.append(rows)
        if self._conversation.prefix and self._rows is not None:
            given = self._rows[self.had - len(rows) : self.had]
            self._conversation.prefix.add(given, self._base_pos + self.had - len(rows), rows)

    def finish(self) -> Encoded:
        out = np.concatenate(self._out) if len(self._out) > 1 else self._out[0]
        return Encoded(self._codec.encode(out[self._first - self._base_pos :], self._first), self._reused)
