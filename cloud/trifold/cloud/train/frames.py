"""Checks of what sites send, ahead of any allocation: against manifest, limits and the batches held."""

from __future__ import annotations

from typing import Final, get_args

from trifold.proto.v1 import train_pb2 as pb
from trifold.shared.bundle.manifest import CodecName, Manifest
from trifold.shared.errors import BadRows, DigestMismatch, InvalidRequest, UnknownSession
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.session.frames import SESSION_BYTES
from trifold.shared.training import wire

_BATCH_BYTES: Final = 64 * 1024 * 1024
"""The fp32 rows of the largest batch, where the budget for rows allows one."""


class TrainFrames:
    """What the training process of a bundle accepts, if all rows held may take `memory` bytes."""

    def __init__(self, manifest: Manifest, memory: int) -> None:
        serving = manifest.serving
        hidden = serving.spec.hidden
        self.digest = manifest.serving_digest
        self.rows = RowCodec(serving.codec, hidden)
        self.max_rows = min(_BATCH_BYTES, memory) // (4 * hidden)
        self.max_length = min(serving.spec.max_positions, self.max_rows)
        self._gradients = {
            codec.wire: codec for codec in (RowCodec(name, hidden) for name in get_args(CodecName))
        }

    def opening(self, request: pb.TrainRequest | None) -> pb.TrainOpen:
        """The Open that a stream must begin with. Raises UnknownSession, DigestMismatch or InvalidRequest."""
        kind = request.WhichOneof("kind") if request is not None else None
        if request is None or kind != "open":
            wrong = UnknownSession if kind in ("forward", "backward") else InvalidRequest
            raise wrong(f"a stream begins with Open, not with {kind or 'nothing'}")
        opening = request.open
        if len(opening.session) != SESSION_BYTES:
            raise InvalidRequest(f"a session id has {SESSION_BYTES} bytes, not {len(opening.session)}")
        if opening.serving_digest != self.digest:
            raise DigestMismatch(
                f"this core is of bundle {self.digest[:12]}, not {opening.serving_digest[:12]!r}: "
                "give the site and the cloud the same bundle"
            )
        self.gradients(opening)
        return opening

    def gradients(self, opening: pb.TrainOpen) -> RowCodec:
        """The codec that a site has chosen for gradients. Raises InvalidRequest."""
        if opening.gradients not in self._gradients:
            raise InvalidRequest(f"{opening.gradients} is no codec for gradients")
        return self._gradients[opening.gradients]

    def size(self, batch: pb.Batch, codec: RowCodec) -> int:
        """The bytes that a batch takes. Raises InvalidRequest or BadRows."""
        sequences, length = batch.sequences, batch.length
        if sequences < 1 or not 1 <= length <= self.max_length or sequences * length > self.max_rows:
            raise InvalidRequest(
                f"a batch of {sequences} sequences of {length} rows: a sequence has 1 to {self.max_length}, "
                f"all together {self.max_rows} at most"
            )
        if batch.codec != codec.wire:
            raise BadRows(f"codec {batch.codec} of the batch is not the one agreed on, {codec.name}")
        return wire.size(sequences, length, codec)
