"""The sites that train: what is held for each, who has a stream, and when it is given up."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from types import TracebackType
from typing import Final, Self

from trifold.cloud.train.activations import Activations, Held
from trifold.shared.errors import (
    Cancelled,
    DeadlineExceeded,
    Overloaded,
    StaleEpoch,
    TrifoldError,
    Unavailable,
)
from trifold.shared.session.scheduler import TurnScheduler

MOST_SITES: Final = 256
MOST_BATCHES: Final = 8
"""Batches held for one site: a few more than gradient accumulation needs to overlap."""

_RETRY_SECONDS: Final = 1.0

_MENDED_BY_RECONNECTING: Final = (Unavailable, Overloaded, DeadlineExceeded, Cancelled, StaleEpoch)

log = logging.getLogger(__name__)


class Site:
    """What is kept of one site, with or without a stream."""

    def __init__(self, key: tuple[str, bytes], number: int) -> None:
        # Of tenant and session: another tenant's session of the same id is another one.
        self.key = key
        # Counts the sites of this process: the session is a secret and must not be logged.
        self.number = number
        self.batches: OrderedDict[int, Held] = OrderedDict()
        self.seat: Seat | None = None
        self.lease: asyncio.TimerHandle | None = None

    @property
    def row_bytes(self) -> int:
        """Of the batches held."""
        return sum(len(held.data) for held in self.batches.values())


class Seat:
    """The one stream that a site has, as a context: leaving it puts the site on its lease, or ends it.

    `lost` fails when another stream takes the site over, or the service stops. `idle` while nothing is asked.
    """

    def __init__(self, table: SiteTable, site: Site) -> None:
        self.site = site
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.idle = True
        self.closed = False
        self._table = table

    def make_room(self, size: int) -> None:
        """For a batch of so many bytes. Raises Overloaded when nobody can be asked for another one again."""
        self._table.make_room(size, self.site)

    def hold(self, batch: int, held: Held) -> None:
        """Holds a batch until its gradients come; the oldest gives way where there are too many.

        Raises Overloaded.
        """
        self.release(batch)
        if len(self.site.batches) == MOST_BATCHES:
            self.release(next(iter(self.site.batches)))
        self.make_room(len(held.data))
        self.site.batches[batch] = held

    def release(self, batch: int) -> None:
        """Forgets a batch, if it is held."""
        self._table.forget(self.site, batch)

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
        # Retrieved here, so that an eviction that came too late to be raised is no complaint of asyncio's.
        if not self.lost.cancel() and not self.lost.cancelled():
            self.lost.exception()
        hopeless = isinstance(error, Exception) and not isinstance(error, _MENDED_BY_RECONNECTING)
        self.closed = self.closed or hopeless or not self.site.batches
        self._table.leave(self)


class SiteTable:
    """Sites by their session; one without a stream is kept for `lease` seconds.

    The encoded rows of all batches held take `memory` bytes at most. Batches give way that their sites can
    send again and hold nothing up by it: those of lost sites, and all but the latest of the others. The site
    that holds most is the first.
    """

    def __init__(
        self, activations: Activations, scheduler: TurnScheduler, *, memory: int, lease: float
    ) -> None:
        self.activations = activations
        self.scheduler = scheduler
        self.memory = memory
        self.lease = lease
        self.draining = False
        self._sites: dict[tuple[str, bytes], Site] = {}
        self._served = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._sites)

    @property
    def batches(self) -> int:
        """How many are held for all sites; any thread may ask."""
        return sum(len(site.batches) for site in [*self._sites.values()])

    @property
    def row_bytes(self) -> int:
        """Bytes of the encoded rows that are held for all sites."""
        return sum(site.row_bytes for site in self._sites.values())

    def make_room(self, size: int, asking: Site) -> None:
        """Forgets as many batches as needed for `size` more bytes of rows. Raises Overloaded."""
        while self.row_bytes + size > self.memory:
            spare = [
                site
                for site in self._sites.values()
                if site.batches and (len(site.batches) > 1 or site.seat is None or site is asking)
            ]
            if not spare:
                wait = "other sites' batches come first"
                raise Overloaded(f"no room for the rows of another batch: {wait}", retry_after=_RETRY_SECONDS)
            most = max(spare, key=lambda site: site.row_bytes)
            self.forget(most, next(iter(most.batches)))

    def forget(self, site: Site, batch: int) -> None:
        """Gives up a batch of a site, if it is held."""
        if held := site.batches.pop(batch, None):
            self.activations.release(held)

    def seat(self, session: bytes, tenant: str = "") -> Seat:
        """Seats a stream of `tenant` at its site, whose older stream is ended.

        Raises Overloaded, Unavailable.
        """
        if self.draining:
            raise Unavailable("the training process is shutting down", retry_after=_RETRY_SECONDS)
        site = self._sites.get((tenant, session)) or self._admit((tenant, session))
        if site.lease:
            site.lease.cancel()
        if site.seat:
            site.seat.evict(StaleEpoch("the site has connected once more, with another stream"))
        site.seat = Seat(self, site)
        self._empty.clear()
        return site.seat

    def leave(self, seat: Seat) -> None:
        """Called by a seat that is left; does nothing for one whose site has another stream."""
        site = seat.site
        if site.seat is not seat:
            return
        site.seat = None
        if seat.closed:
            self._release(site)
        else:
            site.lease = asyncio.get_running_loop().call_later(self.lease, self._release, site)
        if not any(site.seat for site in self._sites.values()):
            self._empty.set()

    async def drain(self) -> None:
        """Admits nobody, ends idle streams, and waits until the others have left with their answer."""
        self.draining = True
        for site in self._sites.values():
            if site.seat and site.seat.idle:
                site.seat.evict(leaving())
        await self._empty.wait()

    def evict_all(self, error: TrifoldError) -> None:
        """Ends every stream with this error."""
        for site in self._sites.values():
            if site.seat:
                site.seat.evict(error)

    def _admit(self, key: tuple[str, bytes]) -> Site:
        if len(self) == MOST_SITES:
            raise Overloaded(f"{MOST_SITES} sites train here already", retry_after=_RETRY_SECONDS)
        self._served += 1
        self._sites[key] = site = Site(key, self._served)
        log.info("site %d begins", site.number)
        return site

    def _release(self, site: Site) -> None:
        del self._sites[site.key]
        for held in site.batches.values():
            self.activations.release(held)
        log.info("site %d ends", site.number)


def leaving() -> Unavailable:
    """What streams end with when the service stops."""
    return Unavailable("the training process is shutting down: connect again", retry_after=_RETRY_SECONDS)
