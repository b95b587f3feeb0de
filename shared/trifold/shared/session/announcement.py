"""What a call says before its first message: that it opens a session which no tier has heard of.

So a tier that is full refuses it at once, before either side has spent a stream on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.telemetry.traces import Metadata

_NEW: Final = ("trifold-session", "new")


def announcement(opening: pb.Open) -> Metadata:
    """The metadata of the call that begins with this Open."""
    return (_NEW,) if opening.epoch == 1 else ()


def announces_new(metadata: Iterable[tuple[str, str | bytes]]) -> bool:
    """Whether the call of this metadata opens a new session; one that says nothing may do either."""
    return _NEW in metadata
