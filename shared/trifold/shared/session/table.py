"""The sessions of one tier: who holds which, what was reserved for it, and when it is given up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from threading import Lock
from types import TracebackType
from typing import Any, Final, Generic, Protocol, Self, TypeVar

from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    OutOfSequence,
    Overloaded,
    PromptTooLong,
    StaleEpoch,
    TrifoldError,
    Unavailable,
)
from trifold.shared.session.scheduler import TurnScheduler
from trifold.shared.session.turnover import Turnover
from trifold.shared.telemetry.metrics import FORGOTTEN, RESUMES

MOST_SESSIONS: Final = 1024
"""With and without a stream."""

_RETRY_SECONDS: Final = 1.0

_MENDED_BY_RESUME: Final = (Unavailable, DeadlineExceeded, Cancelled, Overloaded, OutOfSequence, StaleEpoch)
"""Ends of a stream that leave a session worth keeping: not a bad request, not a failing engine."""

log = logging.getLogger(__name__)


class Cache(Protocol):
    """The KV cache of a session."""

    have: int


C = TypeVar("C", bound=Cache)
C_co = TypeVar("C_co", bound=Cache, covariant=True)


class CacheMaker(Protocol[C_co]):
    """Makes caches: a shard."""

    def cache(self, capacity: int) -> C_co: ...
    def cache_bytes(self, capacity: int) -> int: ...
    def release(self, cache: Any) -> None:
        """Takes back the memory of one of its caches, which may still be in a turn; any thread may ask."""
        ...


def _in_use() -> float:
    """Of a seat that nobody has said anything of."""
    return 0.0


class Session(Generic[C]):
    """What a tier keeps of one session, with or without a stream."""

    def __init__(self, opening: pb.Open, tenant: str, size: int, number: int) -> None:
        # Another tenant's session of the same id is another one: nobody learns that it exists.
        self.key = (tenant, opening.session)
        self.epoch = opening.epoch
        self.capacity = opening.capacity
        self.size = size
        # Counts the sessions of this process: the id is a secret and must not be logged.
        self.number = number
        self.cache: C | None = None
        self.gone = False
        self._giving_up = Lock()
        self.seat: Seat[C] | None = None
        self.ending = ""  # the reason that its latest stream ended for
        self.lease: asyncio.TimerHandle | None = None

    def hold(self, maker: CacheMaker[C]) -> C:
        """Its cache, made where there is none yet. On the engine: the session may be given up meanwhile."""
        if self.cache is None:
            made = self.cache = maker.cache(self.capacity)
            if self.gone:
                self.give_up(maker)
            return made
        return self.cache

    def give_up(self, maker: CacheMaker[C]) -> None:
        """Nothing is held for it any more."""
        with self._giving_up:
            self.gone, cache, self.cache = True, self.cache, None
        if cache is not None:
            maker.release(cache)

    @property
    def have(self) -> int:
        return self.cache.have if self.cache is not None else 0


class Seat(Generic[C]):
    """The one stream that a session has, as a context: leaving it puts the session on its lease, or ends it.

    `lost` fails when another stream takes the session over, or the service stops.
    The session ends with its seat when it was closed, when it holds nothing, and when its stream failed in a
    way that no resume could mend.
    """

    def __init__(self, table: SessionTable[C], session: Session[C]) -> None:
        loop = asyncio.get_running_loop()
        self.session = session
        self.since = loop.time()
        self.idle: Callable[[], float] = _in_use
        """For how many seconds it has been the caller's turn to do something."""
        self.lost: asyncio.Future[None] = loop.create_future()
        self.closed = False
        self._table = table

    async def cache(self) -> C:
        """The session's cache, when the engine has made it and done with whatever used it before."""
        hold = partial(self.session.hold, self._table.maker)
        return (await self._table.scheduler.run(self, hold)).value

    def evict(self, error: TrifoldError) -> None:
        """Ends the stream with this error."""
        self._table.scheduler.forget(self)
        if not self.lost.done():
            self.lost.set_exception(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._table.scheduler.forget(self)
        self.idle = _in_use  # whoever told holds the cache
        self.session.ending = error.reason if isinstance(error, TrifoldError) else Unavailable.reason
        # Retrieved here, so that an eviction that came too late to be raised is no complaint of asyncio's.
        if not self.lost.cancel() and not self.lost.cancelled():
            self.lost.exception()
        hopeless = isinstance(error, Exception) and not isinstance(error, _MENDED_BY_RESUME)
        self.closed = self.closed or hopeless or self.session.have == 0
        self._table.leave(self)


class SessionTable(Generic[C]):
    """Sessions by id, within `memory` bytes of caches; one without a stream is kept for `lease` seconds.

    New ones are refused while `streams` sessions have a stream. One that was admitted before is let in again;
    one whose caller has let its stream rest for `lease` seconds gives way to a new one.
    """

    def __init__(
        self,
        maker: CacheMaker[C],
        scheduler: TurnScheduler,
        *,
        memory: int,
        streams: int,
        lease: float,
    ) -> None:
        self.maker = maker
        self.scheduler = scheduler
        self.memory = memory
        self.streams = streams
        self.lease = lease
        self.reserved = 0
        self.draining = False
        self._sessions: dict[tuple[str, bytes], Session[C]] = {}
        self._served = 0
        self._turnover = Turnover()
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def seated(self) -> int:
        """Sessions that have a stream; any thread may ask."""
        return sum(session.seat is not None for session in [*self._sessions.values()])

    def seat(self, opening: pb.Open, tenant: str = "") -> Seat[C]:
        """Seats a stream of `tenant` at its session, new or taken over from an older stream, which is ended.

        Raises StaleEpoch, Overloaded, PromptTooLong, Unavailable while draining, and InvalidRequest for a
        session of another capacity.
        """
        self._check_open()
        session = self._sessions.get((tenant, opening.session))
        session = self._admit(opening, tenant) if session is None else self._take_over(session, opening)
        session.seat = Seat(self, session)
        self._empty.clear()
        return session.seat

    def place(self) -> Seat[C] | None:
        """Where a new session would go: in the place of an idle one, or where nobody is.

        Raises Overloaded where there is no place, and Unavailable while draining.
        """
        self._check_open()
        seats = [session.seat for session in self._sessions.values() if session.seat]
        taken = [seat for seat in seats if not seat.lost.done()]
        if len(taken) < self.streams:
            return None
        idlest = max(taken, key=lambda seat: seat.idle())
        if idlest.idle() < self.lease:
            raise Overloaded(
                f"all {self.streams} sessions that are served at a time are running",
                retry_after=self._turnover.seconds,
            )
        return idlest

    def leave(self, seat: Seat[C]) -> None:
        """Called by a seat that is left; does nothing for one whose session another stream has taken over."""
        session = seat.session
        if session.seat is not seat:
            return
        session.seat = None
        self._turnover.note(asyncio.get_running_loop().time() - seat.since)
        if seat.closed:
            self._release(session)
        else:
            session.lease = asyncio.get_running_loop().call_later(self.lease, self._release, session)
        if not any(session.seat for session in self._sessions.values()):
            self._empty.set()

    async def drain(self) -> None:
        """Admits nobody any more, and waits until the last stream has left."""
        self.draining = True
        await self._empty.wait()

    def evict_all(self, error: TrifoldError) -> None:
        """Ends every stream with this error."""
        for session in self._sessions.values():
            if session.seat:
                session.seat.evict(error)

    def _admit(self, opening: pb.Open, tenant: str) -> Session[C]:
        """A new session, in the place of an idle one where it needs that. Raises Overloaded."""
        idle = None if opening.admitted else self.place()
        session = self._reserve(opening, tenant)
        if idle:
            idle.evict(Unavailable("the session was idle, and its place was needed: resume it"))
        return session

    def _check_open(self) -> None:
        if self.draining:
            raise Unavailable("the service is shutting down", retry_after=_RETRY_SECONDS)

    def _reserve(self, opening: pb.Open, tenant: str) -> Session[C]:
        size = self.maker.cache_bytes(opening.capacity)
        if size > self.memory:
            room = self.memory >> 20
            raise PromptTooLong(
                f"{opening.capacity} positions take {size >> 20} MiB of KV, this tier has {room} MiB"
            )
        if self.reserved + size > self.memory or len(self) == MOST_SESSIONS:
            raise Overloaded(
                f"no room for {opening.capacity} positions: {len(self)} sessions hold "
                f"{self.reserved >> 20} of {self.memory >> 20} MiB",
                retry_after=self._turnover.seconds,
            )
        if opening.admitted:
            RESUMES.labels(FORGOTTEN).inc()
        self._served += 1
        session: Session[C] = Session(opening, tenant, size, self._served)
        self._sessions[session.key] = session
        self.reserved += size
        log.info("session %d begins: %d positions", session.number, session.capacity)
        return session

    def _take_over(self, session: Session[C], opening: pb.Open) -> Session[C]:
        if opening.epoch <= session.epoch:
            raise StaleEpoch(f"the session is held in epoch {session.epoch}, this is epoch {opening.epoch}")
        if opening.capacity != session.capacity:
            raise InvalidRequest(f"the session was opened with a capacity of {session.capacity} positions")
        RESUMES.labels(StaleEpoch.reason if session.seat else session.ending).inc()
        session.epoch = opening.epoch
        if session.lease:
            session.lease.cancel()
        if session.seat:
            session.seat.evict(StaleEpoch(f"the session was taken over in epoch {session.epoch}"))
        log.info("session %d goes on in epoch %d", session.number, session.epoch)
        return session

    def _release(self, session: Session[C]) -> None:
        del self._sessions[session.key]
        self.reserved -= session.size
        session.give_up(self.maker)
        log.info("session %d ends", session.number)
