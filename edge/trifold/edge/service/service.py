"""The edge: token ids in, rows through the edge's layers and the core, rows out."""

from __future__ import annotations

import asyncio
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np

from trifold.edge.service.upstream import Core, CoreStream
from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import DigestMismatch, Unavailable
from trifold.shared.runtime.shard import Cache, Shard
from trifold.shared.runtime.versions import ShardVersions, Version
from trifold.shared.session.conversation import Conversation
from trifold.shared.session.frames import Steps
from trifold.shared.session.scheduler import Turn, TurnScheduler
from trifold.shared.session.service import TierService, info_of
from trifold.shared.session.stream import Stream, until_first
from trifold.shared.session.table import Seat
from trifold.shared.session.window import Encoded, Lane, Passage
from trifold.shared.telemetry import metrics

_ROUND_TRIP = metrics.ROUND_TRIP.labels("edge-cloud")


class EdgeService(TierService):
    """Runs the edge's shard for many devices, with one core behind it.

    A session has a stream on either side, and both end together: a core that is lost ends the device's
    stream, and the device opens the session again.
    It runs on the adapter version that the device opened it with, from its first stream to its last.
    """

    name = "trifold.proto.v1.EdgeService"
    link = "device-edge"
    takes = "tokens"
    counted = metrics.EDGE

    def __init__(
        self, versions: ShardVersions, core: Core, *, memory: int, streams: int, lease: float
    ) -> None:
        super().__init__(
            versions.base,
            TurnScheduler(),
            versions.folder.manifest,
            memory=memory,
            streams=streams,
            lease=lease,
        )
        self._core = core
        self._versions = versions
        self._began_with: WeakKeyDictionary[Cache, Version] = WeakKeyDictionary()
        self._following = asyncio.create_task(versions.follow())

    async def describe(self) -> pb.DescribeResponse:
        own, behind = await super().describe(), await self._core.describe()
        own.tiers.extend(behind.tiers)
        own.max_rows = min(own.max_rows, behind.max_rows)
        own.adapter_digest = self.adapter
        return own

    @property
    def adapter(self) -> str:
        return self._versions.current.digest

    async def close(self) -> None:
        self._following.cancel()
        await super().close()
        await self._core.close()

    async def converse(self, stream: Stream, opening: pb.Open, seat: Seat[Cache]) -> None:
        cache = await seat.cache()
        version = self._began_with.get(cache)
        if version is None:
            shard = await self._versions.get(opening.adapter_digest)
            version = self._began_with[cache] = Version(opening.adapter_digest, shard)
        if version.digest != opening.adapter_digest:
            raise DigestMismatch("the session began on another adapter version: resume it on that one")
        steps = self.frames.steps(opening, cache.have)
        towards_core = pb.Open(
            session=opening.session,
            epoch=opening.epoch,
            serving_digest=opening.serving_digest,
            capacity=opening.capacity,
            steps_in_flight=steps.in_flight,
            admitted=opening.admitted,
        )
        async with self._core.open(towards_core, stream.span) as core:
            opened = pb.Opened(
                have=min(cache.have, core.opened.have),
                steps_in_flight=min(steps.in_flight, core.opened.steps_in_flight),
                max_rows=min(self.frames.max_rows, core.opened.max_rows),
                lease_ms=min(round(self.table.lease * 1000), core.opened.lease_ms),
                tiers=[info_of(version.shard), *core.opened.tiers],
            )
            await stream.write(pb.SessionResponse(opened=opened))
            steps.limit(have=opened.have, in_flight=opened.steps_in_flight)
            await EdgeConversation(self, version.shard, core, stream, seat, cache, steps).run()


class EdgeConversation(Conversation):
    """A device's tokens through edge and core: rows are sent on while the engine is at the next step."""

    def __init__(
        self,
        edge: EdgeService,
        shard: Shard,
        core: CoreStream,
        stream: Stream,
        seat: Seat[Cache],
        cache: Cache,
        steps: Steps,
    ) -> None:
        super().__init__(stream, seat, steps)
        self._edge = edge
        self._cache = cache
        self._shard = shard
        self._core = core
        self._codec = edge.frames.codec
        self._sent = Lane(self._answer)

    async def run(self) -> None:
        try:
            await until_first(self._core.lost(), self.take(), self._send_on(), self._sent.run())
        except Unavailable:
            # After a Close the core ends its stream, too: that is no loss.
            if not self.seat.closed:
                raise

    def submit(self, step: pb.Step) -> asyncio.Future[Turn[Encoded | None]]:
        small = step.header.rows == 1
        return self._edge.scheduler.run(self.seat, partial(self._compute, step), small=small)

    def _compute(self, step: pb.Step) -> Encoded | None:
        if self.steps.stale(step):
            return None
        base_pos = step.header.base_pos
        tokens = np.array(step.tokens.ids, np.int64)
        return Encoded(self._codec.encode(self._shard.run(self._cache, tokens, base_pos), base_pos))

    async def pass_on(self, passage: Passage) -> None:
        encoded = (await passage.turn).value
        if encoded is not None:
            passage.bytes_up = await self._core.send(passage.header, self._codec.wire, encoded.rows)
        self._sent.put(passage)

    async def closing(self) -> None:
        await self._core.close()

    async def _send_on(self) -> None:
        await self.computed.run()
        self._sent.finish()
        await asyncio.get_running_loop().create_future()

    async def _answer(self, passage: Passage) -> None:
        turn = passage.turn.result()
        if turn.value is None:
            passage.header.rows = 0
            response = pb.SessionResponse(result=pb.Result(header=passage.header, stale=True))
        else:
            response, bytes_down = await self._core.receive()
            self._check(response.result, passage.header)
            response.result.header.seq = passage.header.seq
            hop = self.hop(passage, turn, self._edge.info)
            hop.bytes_up, hop.bytes_down = passage.bytes_up, bytes_down
            if passage.header.rows == 1:
                self._note_round_trip(hop, response.result)
            response.result.hops.append(hop)
        self.window.answered()
        await self.stream.write(response)

    def _note_round_trip(self, hop: pb.Hop, result: pb.Result) -> None:
        """What of the time of a step neither this tier nor the core accounts for."""
        core_ns = sum(hop.total_ns for hop in result.hops)
        _ROUND_TRIP.observe(max(0, hop.total_ns - hop.queue_ns - hop.compute_ns - core_ns) / 1e9)

    def _check(self, result: pb.Result, asked: pb.Header) -> None:
        """Raises TrifoldError unless the core answers what it was asked."""
        header = result.header
        first = header.base_pos if result.stale else self._edge.first_wanted(asked)
        rows = 0 if result.stale else asked.base_pos + asked.rows - first
        if (header.base_pos, header.rows) != (first, rows):
            got = f"{header.rows} rows at position {header.base_pos}"
            raise self._core.nonsense(f"{got} where {rows} at {first} were expected")
        if len(result.rows) != self._codec.size(rows, first):
            raise self._core.nonsense(f"{len(result.rows)} bytes for {rows} rows")
