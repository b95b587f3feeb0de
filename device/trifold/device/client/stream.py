"""One incarnation of a session on the edge: an Open, then steps and their answers in order."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from trifold.device.client.call import Call
from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import BadRows, OutOfSequence


@dataclass(frozen=True)
class Delivery:
    """The answer to the step of positions `start` to `end`: `rows` rows from `base_pos` on, in `data`.

    `resumed` marks the first answer of a stream that is not the session's first; `changed` names the tiers
    whose fingerprint is another since then. Bytes are those of the serialized messages.
    """

    start: int
    end: int
    base_pos: int
    rows: int
    data: bytes
    hops: tuple[pb.Hop, ...]
    sent_ns: int
    received_ns: int
    bytes_up: int
    bytes_down: int
    resumed: bool
    changed: tuple[str, ...]


@dataclass(frozen=True)
class _Sent:
    """A step that waits for its answer."""

    seq: int
    start: int
    end: int
    logits_from: int
    size: int
    at_ns: int


class Stream:
    """Sends the tokens of a session as steps, a window of them ahead, and checks every answer."""

    def __init__(self, call: Call, opening: pb.Open, *, every_row: bool, chunk: int) -> None:
        """A step has at most `chunk` tokens; `every_row` as for a Link."""
        self.changed: tuple[str, ...] = ()
        self._call = call
        self._opening = opening
        self._every_row = every_row
        self._chunk = chunk
        self._resumed = opening.epoch > 1
        self._limits = pb.Opened()
        self._unanswered: deque[_Sent] = deque()
        self._seq = 0
        self._next = 0

    async def open(self, needed: int) -> pb.Opened:
        """Opens the session; steps will begin at `needed`, or at the first position that a tier lacks."""
        self._call.send(pb.SessionRequest(open=self._opening))
        self._limits = (await self._call.receive())[0].opened
        if not (self._limits.max_rows and self._limits.steps_in_flight):
            raise OutOfSequence("the edge did not answer Open with Opened and its limits")
        self._chunk = min(self._chunk, self._limits.max_rows)
        self._next = min(self._limits.have, needed)
        return self._limits

    def send_ahead(self, ids: Sequence[int]) -> None:
        """Sends what has not been sent of `ids`, as far as the window allows; the last one needs logits."""
        while self._next < len(ids) and len(self._unanswered) < self._limits.steps_in_flight:
            end = min(self._next + self._chunk, len(ids))
            self._send(ids[self._next : end], logits_from=min(end, max(self._next, len(ids) - 1)))

    async def take(self) -> Delivery:
        """The answer to the oldest step. Raises OutOfSequence or BadRows when it is another's."""
        response, received_ns = await self._call.receive()
        if not self._unanswered:
            raise OutOfSequence("the edge sent an answer to nothing")
        result, sent = response.result, self._unanswered.popleft()
        header = result.header
        if response.WhichOneof("kind") != "result" or header.seq != sent.seq or result.stale:
            raise OutOfSequence(f"the edge sent something else than the answer to step {sent.seq}")
        first = sent.start if self._every_row else sent.logits_from
        if (header.base_pos, header.rows) != (first, sent.end - first):
            got = f"{header.rows} rows at position {header.base_pos}"
            raise BadRows(f"the edge answered step {sent.seq} with {got}, not {sent.end - first} at {first}")
        resumed, self._resumed = self._resumed, False
        changed, self.changed = self.changed, ()
        return Delivery(
            start=sent.start,
            end=sent.end,
            base_pos=first,
            rows=header.rows,
            data=result.rows,
            hops=tuple(result.hops),
            sent_ns=sent.at_ns,
            received_ns=received_ns,
            bytes_up=sent.size,
            bytes_down=response.ByteSize(),
            resumed=resumed,
            changed=changed,
        )

    def begin_close(self) -> asyncio.Task[None]:
        """Says Close, unless that has been done; the task is over when the edge has heard it."""
        return self._call.begin_close()

    def _send(self, ids: Sequence[int], logits_from: int) -> None:
        end = self._next + len(ids)
        header = pb.Header(
            session=self._opening.session,
            epoch=self._opening.epoch,
            seq=self._seq,
            base_pos=self._next,
            rows=len(ids),
            logits_from=logits_from,
        )
        request = pb.SessionRequest(step=pb.Step(header=header, tokens=pb.Tokens(ids=ids)))
        sent = _Sent(self._seq, self._next, end, logits_from, request.ByteSize(), time.monotonic_ns())
        self._unanswered.append(sent)
        self._seq, self._next = self._seq + 1, end
        self._call.send(request)
