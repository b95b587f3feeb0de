"""The link to the edge: steps out, rows back, whatever happens in between."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Final, Self

from trifold.device.client.call import Call, SessionCall
from trifold.device.client.journal import Journal
from trifold.device.client.stream import Delivery, Stream
from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import Cancelled, DeadlineExceeded, Overloaded, TrifoldError, Unavailable
from trifold.shared.session.announcement import announcement
from trifold.shared.telemetry.metrics import RESUMES
from trifold.shared.telemetry.traces import Span

_PASSES: Final = (Unavailable, Overloaded)
"""What waiting may help against: a lost tier or connection, and a tier that was lost and is full now."""

_SHORTEST_PAUSE: Final = 0.02
_LONGEST_PAUSE: Final = 1.0

log = logging.getLogger(__name__)


class Link:
    """A session on the edge that outlives the loss of the edge, of the core, and of every connection.

    After a loss it opens the session again with a higher epoch and goes on from the first position that any
    tier lacks. It gives up after `timeout` seconds without progress; a first open that fails is not repeated.
    """

    def __init__(
        self,
        call: Callable[..., SessionCall],
        edge: str,
        journal: Journal,
        device: pb.TierInfo,
        *,
        every_row: bool,
        chunk: int,
        timeout: float,
        span: Span,
    ) -> None:
        """`call` begins a call of EdgeService.Session; a step has at most `chunk` tokens.

        `every_row` says that this device gets all rows, not only those whose logits are needed. Calls are
        traced below `span`.
        """
        self._tiers: list[pb.TierInfo] = [device]
        self._call = call
        self._edge = edge
        self._journal = journal
        self._device = device
        self._every_row = every_row
        self._chunk = chunk
        self._timeout = timeout
        self._span = span
        self._stream: Stream | None = None
        self._opened = bool(journal.fingerprints)
        self._reached = 0
        self._loss: TrifoldError | None = None  # what no progress has followed yet
        self._lost_at = 0.0
        self._patience: asyncio.Timeout | None = None
        self._given_up = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream:
            await asyncio.shield(self._stream.begin_close())

    @property
    def exact(self) -> bool:
        """Whether every tier has passed its numerics self-test."""
        return all(tier.exact for tier in self._tiers)

    async def receive(self, needed: int) -> Delivery:
        """The answer to the next step of the journal's tokens, of which it sends as many ahead as it may.

        `needed` is the first position whose row this device has not used yet.
        Raises Cancelled after give_up(), DeadlineExceeded when the edge is silent, Unavailable when a tier is
        not there or stays away, and at once whatever else the edge refuses.
        """
        async with self._within_patience():
            while True:
                try:
                    stream = self._stream or await self._open(needed)
                    stream.send_ahead(self._journal.ids)
                    delivery = await stream.take()
                    self._note_progress(delivery)
                    return delivery
                except _PASSES as loss:
                    await self._pause(loss)

    def send_ahead(self) -> None:
        """Sends what the journal has and the edge has not, as far as it may; receive() tells of losses."""
        if self._stream:
            self._stream.send_ahead(self._journal.ids)

    def give_up(self) -> None:
        """Ends the wait in receive(), now or when it is next called."""
        self._given_up = True
        if self._patience:
            self._patience.reschedule(0)
        elif self._stream:
            self._stream.begin_close()

    async def _open(self, needed: int) -> Stream:
        request = self._journal.request
        opening = pb.Open(
            session=bytes.fromhex(request.session),
            epoch=self._journal.raise_epoch(),
            serving_digest=request.serving_digest,
            adapter_digest=request.adapter_digest,
            capacity=request.capacity,
            admitted=self._opened,
            sampling=pb.Sampling(
                temperature=request.sampling.temperature,
                top_k=request.sampling.top_k,
                top_p=request.sampling.top_p,
                seed=request.sampling.seed,
            ),
        )
        hint = "" if self._opened else " (is `trifold edge serve` running there?)"
        begun = self._call(
            wait_for_ready=self._opened, metadata=(*announcement(opening), *self._span.metadata)
        )
        call = Call(begun, f"the edge at {self._edge}{hint}")
        self._stream = Stream(call, opening, every_row=self._every_row, chunk=self._chunk)
        opened = await self._stream.open(needed)
        self._opened = True
        self._tiers = [*opened.tiers, self._device]
        self._stream.changed = self._journal.note_fingerprints({t.tier: t.fingerprint for t in self._tiers})
        return self._stream

    def _note_progress(self, delivery: Delivery) -> None:
        """Only new positions count: a step that brings a tier down each time is not repeated for ever."""
        if delivery.end > self._reached:
            self._reached = delivery.end
            if self._loss:
                RESUMES.labels(self._loss.reason).inc()
                self._span.event("resumed", self._loss.reason)
                log.info("resumed after %.1f s", asyncio.get_running_loop().time() - self._lost_at)
                self._loss = None

    async def _pause(self, loss: TrifoldError) -> None:
        """Waits before the next attempt: at first hardly, later a tenth of the time that has passed."""
        self._stream = None
        if not self._opened:
            raise loss
        now = asyncio.get_running_loop().time()
        if self._loss is None:
            self._lost_at = now
            log.warning("lost the edge at %s: trying for %g s (%s)", self._edge, self._timeout, loss.message)
        self._loss = loss
        pause = min(max((now - self._lost_at) / 10, loss.retry_after or _SHORTEST_PAUSE), _LONGEST_PAUSE)
        await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - jitter, not a secret

    @asynccontextmanager
    async def _within_patience(self) -> AsyncIterator[None]:
        """A wait that give_up() ends, and that is over `timeout` seconds after the last progress."""
        if self._given_up:
            raise Cancelled("the generation was cancelled")
        since = asyncio.get_running_loop().time() if self._loss is None else self._lost_at
        try:
            async with asyncio.timeout_at(since + self._timeout) as self._patience:
                yield
        except TimeoutError:
            if self._given_up:
                raise Cancelled("the generation was cancelled") from None
            if self._loss:
                raise Unavailable(f"gave up after {self._timeout:g} s: {self._loss.message}") from self._loss
            silence = f"the edge at {self._edge} gave no answer within {self._timeout:g} s"
            raise DeadlineExceeded(silence) from None
        finally:
            self._patience = None
