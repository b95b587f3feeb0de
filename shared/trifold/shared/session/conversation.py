"""One stream between Opened and its end: steps taken in, computed in turn, and answered in order."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from time import perf_counter_ns
from typing import Any, Final

from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import InvalidRequest
from trifold.shared.session.frames import Steps
from trifold.shared.session.scheduler import Turn
from trifold.shared.session.stream import Stream, until_first
from trifold.shared.session.table import Seat
from trifold.shared.session.window import Encoded, Lane, Passage, Window
from trifold.shared.telemetry import metrics

_PROMPT: Final = metrics.Steps("prompt")
_TOKEN: Final = metrics.Steps("token")


class Conversation(ABC):
    """What the streams of both tiers have in common; a tier says how it computes and answers."""

    def __init__(self, stream: Stream, seat: Seat[Any], steps: Steps) -> None:
        self.stream = stream
        self.seat = seat
        self.steps = steps
        self.window = Window(steps.in_flight)
        self.computed = Lane(self.pass_on)
        seat.idle = self._idle

    async def run(self) -> None:
        """Goes on until the caller closes or leaves. Raises what is wrong with a step, or with this tier."""
        await until_first(self.take(), self.computed.run())

    @abstractmethod
    def submit(self, step: pb.Step) -> asyncio.Future[Turn[Encoded | None]]:
        """To the engine: the rows for the next tier; None for a step that is stale by its turn."""

    @abstractmethod
    async def pass_on(self, passage: Passage) -> None:
        """Awaits its turn and sends what that gave to the next tier, or back."""

    async def closing(self) -> None:  # noqa: B027 - nothing to do in the last tier
        """Called when the caller has closed the session, before anything is given up."""

    async def take(self) -> None:
        """Computes the caller's steps. Does not end before the conversation, unless by Close."""
        while (request := await self.stream.read()) is not None:
            arrived_ns = perf_counter_ns()
            kind = request.WhichOneof("kind")
            if kind == "close":
                self.seat.closed = True
                await self.closing()
                return
            if kind != "step":
                raise InvalidRequest(f"{kind or 'nothing'} where a Step or Close is expected")
            step = request.step
            self.steps.check(step)
            if self.seat.lost.done():
                return  # to whoever has the session now: nothing of this stream is to be computed any more
            self.window.come()
            await self.computed.pass_on(Passage(step.header, self.submit(step), arrived_ns))
        self.computed.finish()
        # The caller has said all: whoever answers the last step ends the conversation.
        await asyncio.get_running_loop().create_future()

    def hop(self, passage: Passage, turn: Turn[Encoded | None], info: pb.TierInfo) -> pb.Hop:
        """What this tier, `info`, tells of a step that it is about to answer, also in metrics and trace."""
        answered_ns = perf_counter_ns()
        total_ns = answered_ns - passage.arrived_ns
        rows = passage.header.rows
        reused = turn.value.reused if turn.value else 0
        if turn.value is not None:
            steps = _TOKEN if rows == 1 else _PROMPT
            steps.observe(turn.queue_ns, turn.compute_ns)
            steps.note(rows - reused, total_ns)
            self.stream.span.step(
                steps.kind,
                passage.arrived_ns,
                answered_ns,
                positions=rows,
                **({"reused": reused} if reused else {}),
                queue_ns=turn.queue_ns,
                compute_ns=turn.compute_ns,
            )
        return pb.Hop(
            tier=info.tier,
            provider=info.provider,
            queue_ns=turn.queue_ns,
            compute_ns=turn.compute_ns,
            total_ns=total_ns,
            reused=reused,
        )

    def _idle(self) -> float:
        """Seconds since the caller should have taken an answer, or asked for something."""
        if self.window.unanswered and self.stream.writing_since is None:
            return 0.0
        since = self.stream.writing_since or self.window.used_at
        return asyncio.get_running_loop().time() - since
