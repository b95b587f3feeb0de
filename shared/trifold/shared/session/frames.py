"""Checks of Open and Step, ahead of any allocation: against manifest, limits and the steps before."""

from __future__ import annotations

from typing import Final, Literal

from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.bundle.manifest import Manifest
from trifold.shared.errors import (
    BadRows,
    DigestMismatch,
    InvalidRequest,
    OutOfSequence,
    PromptTooLong,
    StaleEpoch,
    UnknownSession,
)
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.runtime.sampling import Sampling
from trifold.shared.session.channel import MESSAGE_BYTES

SESSION_BYTES: Final = 16
STEPS_IN_FLIGHT: Final = 4
MOST_STEPS_IN_FLIGHT: Final = 16

_MOST_ROWS: Final = 512
_ENVELOPE_BYTES: Final = 4096
"""Room for everything in a message but its rows."""


class Frames:
    """What one tier accepts, in `takes`: token ids (edge) or rows (cloud)."""

    def __init__(self, manifest: Manifest, takes: Literal["tokens", "rows"]) -> None:
        serving = manifest.serving
        self.takes = takes
        self.digest = manifest.serving_digest
        self.vocab = serving.spec.vocab
        self.max_positions = serving.spec.max_positions
        self.codec = RowCodec(serving.codec, serving.spec.hidden)
        self.max_rows = most_rows(self.codec)

    def opening(self, request: pb.SessionRequest | None) -> pb.Open:
        """The Open that a stream must begin with.

        Raises UnknownSession, DigestMismatch, PromptTooLong or InvalidRequest.
        """
        kind = request.WhichOneof("kind") if request is not None else None
        if request is None or kind != "open":
            wrong = UnknownSession if kind == "step" else InvalidRequest
            raise wrong(f"a stream begins with Open, not with {kind or 'nothing'}")
        opening = request.open
        if len(opening.session) != SESSION_BYTES:
            raise InvalidRequest(f"a session id has {SESSION_BYTES} bytes, not {len(opening.session)}")
        if opening.serving_digest != self.digest:
            theirs = opening.serving_digest[:12]
            raise DigestMismatch(
                f"this tier serves bundle {self.digest[:12]}, not {theirs!r}: give all tiers the same bundle"
            )
        if opening.capacity > self.max_positions:
            raise PromptTooLong(
                f"{opening.capacity} positions do not fit the model's {self.max_positions}: "
                "shorten the prompt or ask for fewer tokens"
            )
        if opening.capacity == 0:
            raise InvalidRequest("capacity is 0: nothing could be generated")
        if opening.HasField("sampling"):
            if self.takes == "rows":
                raise InvalidRequest("sampling parameters are not for this tier")
            wish = opening.sampling
            Sampling(wish.temperature, wish.top_k, wish.top_p or 1.0, wish.seed)
        return opening

    def steps(self, opening: pb.Open, have: int) -> Steps:
        """The order of steps on the stream that `opening` opened, when the session holds `have` positions."""
        return Steps(self, opening, have)


class Steps:
    """The steps of one stream, each checked against those before it."""

    def __init__(self, frames: Frames, opening: pb.Open, have: int) -> None:
        self.in_flight = min(opening.steps_in_flight or STEPS_IN_FLIGHT, MOST_STEPS_IN_FLIGHT)
        self.branch = 0
        self._frames = frames
        self._session = opening.session
        self._epoch = opening.epoch
        self._capacity = opening.capacity
        self._seq = 0
        self._end = have

    def limit(self, *, have: int, in_flight: int) -> None:
        """Lowers what was granted to what the tiers behind this one grant as well."""
        self._end = min(self._end, have)
        self.in_flight = min(self.in_flight, in_flight)

    def stale(self, step: pb.Step) -> bool:
        """Whether the branch of the step has been given up, by a later step perhaps."""
        return step.header.branch < self.branch

    def check(self, step: pb.Step) -> None:
        """Accepts the next step, or raises what is wrong with it.

        UnknownSession, StaleEpoch, OutOfSequence (naming what was expected), BadRows or InvalidRequest.
        """
        header = step.header
        if header.session != self._session:
            raise UnknownSession("the step is of a session that this stream has not opened")
        if header.epoch != self._epoch:
            raise StaleEpoch(f"the step is of epoch {header.epoch}, its stream of epoch {self._epoch}")
        if header.seq != self._seq:
            raise OutOfSequence(f"step {header.seq} came where step {self._seq} was expected")
        if not self.stale(step):
            self._check_span(header)
            self._check_payload(step)
            self.branch = header.branch
            self._end = header.base_pos + header.rows
        self._seq += 1

    def _check_span(self, header: pb.Header) -> None:
        if not 1 <= header.rows <= self._frames.max_rows:
            raise InvalidRequest(f"a step of {header.rows} rows: it may have 1 to {self._frames.max_rows}")
        if header.base_pos > self._end:
            raise OutOfSequence(
                f"the step begins at position {header.base_pos}, the session holds {self._end}: "
                f"expected position {self._end} or earlier"
            )
        end = header.base_pos + header.rows
        if end > self._capacity:
            raise InvalidRequest(f"the step ends at position {end}, {self._capacity} were reserved at Open")
        if not header.base_pos <= header.logits_from <= end:
            raise InvalidRequest(
                f"logits_from is {header.logits_from}: it must lie in {header.base_pos} to {end}"
            )

    def _check_payload(self, step: pb.Step) -> None:
        header, codec = step.header, self._frames.codec
        kind = step.WhichOneof("payload")
        if kind != self._frames.takes:
            raise InvalidRequest(f"a step of {kind or 'nothing'} where {self._frames.takes} are expected")
        if kind == "tokens":
            ids = step.tokens.ids
            if header.codec != pb.CODEC_UNSPECIFIED:
                raise InvalidRequest("a step of tokens has no codec")
            if len(ids) != header.rows:
                raise InvalidRequest(f"{len(ids)} token ids in a step of {header.rows} rows")
            if max(ids) >= self._frames.vocab:
                raise InvalidRequest(f"a token id is beyond the vocabulary of {self._frames.vocab}")
            return
        if header.codec != codec.wire:
            raise BadRows(f"codec {header.codec} of the rows is not the bundle's, {codec.name}")
        codec.check_size(len(step.rows), header.rows, header.base_pos)


def most_rows(codec: RowCodec) -> int:
    """The rows that fit one message wherever they stand, at most 512."""
    room = MESSAGE_BYTES - _ENVELOPE_BYTES
    return max((rows for rows in range(1, _MOST_ROWS + 1) if codec.size(rows, 0) <= room), default=1)
