"""What the services of edge and cloud have in common: sessions opened, seated and described."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from importlib.metadata import version
from time import time
from typing import Any, ClassVar, Final, Literal, Protocol

import structlog
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.bundle.manifest import Manifest, Tier
from trifold.shared.session.frames import MOST_STEPS_IN_FLIGHT, Frames
from trifold.shared.session.scheduler import TurnScheduler
from trifold.shared.session.stream import Stream, until_first
from trifold.shared.session.table import CacheMaker, Seat, SessionTable
from trifold.shared.telemetry import metrics

_VERSION: Final = version("trifold")
"""Read once: under a service that runs, another one may be installed."""


class Engine(CacheMaker[Any], Protocol):
    """What computes a tier: a shard, or the core's engine."""

    @property
    def tier(self) -> Tier: ...
    @property
    def provider(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def exact(self) -> bool: ...


class TierService(ABC):
    """One tier's sessions. `name` is its gRPC service, `link` what comes there, `counted` its metrics."""

    name: ClassVar[str]
    link: ClassVar[str]
    takes: ClassVar[Literal["tokens", "rows"]]
    counted: ClassVar[Collection[Collector]]

    def __init__(
        self,
        engine: Engine,
        scheduler: TurnScheduler,
        manifest: Manifest,
        *,
        memory: int,
        streams: int,
        lease: float,
    ) -> None:
        """Serves `engine`, whose turns are the scheduler's, of the bundle of `manifest`.

        `memory`, `streams` and `lease` as for SessionTable.
        """
        self.frames = Frames(manifest, self.takes)
        self.scheduler = scheduler
        self.table = SessionTable[Any](engine, scheduler, memory=memory, streams=streams, lease=lease)
        self.info = info_of(engine)
        cuts, layers = manifest.serving.cuts, manifest.serving.spec.layers
        self._device_attends = cuts.cloud < len(layers)

    @property
    def digest(self) -> str:
        return self.frames.digest

    async def session(self, stream: Stream) -> None:
        """One stream, from Open to its end. Raises the TrifoldError that ends it."""
        if stream.new:
            self.table.place()
        opening = self.frames.opening(await stream.first())
        with self.table.seat(opening, stream.tenant) as seat:
            structlog.contextvars.bind_contextvars(session=seat.session.number)
            await until_first(seat.lost, self.converse(stream, opening, seat))

    async def describe(self) -> pb.DescribeResponse:
        """What this tier is and how busy."""
        return pb.DescribeResponse(
            serving_digest=self.frames.digest,
            max_positions=self.frames.max_positions,
            max_rows=self.frames.max_rows,
            steps_in_flight=MOST_STEPS_IN_FLIGHT,
            sessions=len(self.table),
            kv_bytes=self.table.reserved,
            kv_bytes_limit=self.table.memory,
            draining=self.table.draining,
            tiers=[self.info],
            time_ms=round(time() * 1000),
        )

    @property
    def adapter(self) -> str:
        """The digest of the adapter version that new sessions get; empty for the bundle's own weights."""
        return ""

    def readings(self) -> Iterator[Metric]:
        """What its metrics are now, besides those that it counts; any thread may ask."""
        seated = self.table.seated
        yield metrics.RUNNING.of(seated)
        yield metrics.WAITING.of(self.scheduler.waiting)
        yield metrics.LIMIT.of(self.table.streams)
        yield metrics.LEASED.of(len(self.table) - seated)
        yield metrics.KV_CACHE.of(self.table.reserved)
        yield metrics.KV_CACHE_LIMIT.of(self.table.memory)
        yield from metrics.build(self.info, self.digest, self.adapter)

    async def close(self) -> None:
        """Stops the engine after the step that it is at."""
        self.scheduler.stop()

    @abstractmethod
    async def converse(self, stream: Stream, opening: pb.Open, seat: Seat[Any]) -> None:
        """Answers Open and the steps after it, until the caller closes or leaves."""

    def first_wanted(self, header: pb.Header) -> int:
        """The first position whose row the device needs: all of them when its shard has attention layers."""
        return header.base_pos if self._device_attends else header.logits_from


def info_of(engine: Engine) -> pb.TierInfo:
    """What a tier that this computes tells of itself."""
    return pb.TierInfo(
        tier=engine.tier,
        version=_VERSION,
        fingerprint=engine.fingerprint,
        provider=engine.provider,
        exact=engine.exact,
    )
