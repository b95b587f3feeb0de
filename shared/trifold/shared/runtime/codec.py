"""The wire codec: how rows are written in bytes at both cuts, and a part of the model.

Every function here depends on a row and its absolute position alone, so that neither the chunks of a prompt
nor the neighbours of a row in a step can change what the next tier computes.
"""

from __future__ import annotations

from typing import Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.bundle.manifest import CodecName
from trifold.shared.errors import BadRows

Rows = NDArray[np.float32]

ANCHORS: Final = 4
"""The first positions, which int8 writes as bf16: attention sinks (arXiv 2309.17453) have outliers there."""

LARGEST: Final = np.float32(2.0**126)
"""Values beyond this count as not finite, so that no codec can round one up to infinity."""

_LARGEST_SCALE: Final = LARGEST / np.float32(127)
_SMALLEST_SCALE: Final = np.finfo(np.float32).tiny

_WIRE: Final[dict[CodecName, pb.Codec.ValueType]] = {
    "none": pb.CODEC_NONE,
    "bf16": pb.CODEC_BF16,
    "int8": pb.CODEC_INT8,
}


class RowCodec:
    """Writes and reads rows of `hidden` fp32 values by one of the codecs that session.proto describes.

    int8 is symmetric: scale = absmax / 127 in fp32, values = round half to even of row / scale.
    """

    def __init__(self, name: CodecName, hidden: int) -> None:
        self.name = name
        self.hidden = hidden
        self.wire = _WIRE[name]

    def size(self, rows: int, base_pos: int) -> int:
        """Bytes of `rows` rows, the first of which stands at position `base_pos`."""
        if self.name == "none":
            return 4 * self.hidden * rows
        anchors = self._anchors(rows, base_pos)
        return 2 * self.hidden * anchors + (4 + self.hidden) * (rows - anchors)

    def check_size(self, given: int, rows: int, base_pos: int) -> None:
        """Raises BadRows unless so many rows take the `given` bytes."""
        size = self.size(rows, base_pos)
        if given != size:
            what = f"{rows} rows at position {base_pos}"
            raise BadRows(f"{what} take {size} bytes in codec {self.name}, not {given}")

    def encode(self, rows: Rows, base_pos: int) -> bytes:
        """The bytes of fp32 rows (n, hidden). Raises BadRows for another shape or for values not finite."""
        if rows.ndim != 2 or rows.shape[1] != self.hidden or rows.dtype != np.float32:
            raise BadRows(f"rows of {rows.dtype} {rows.shape} where float32 (n, {self.hidden}) is needed")
        peaks = _peaks(rows)
        if self.name == "none":
            return rows.astype("<f4", copy=False).tobytes()
        anchors = self._anchors(len(rows), base_pos)
        if anchors == 0:
            return self._quantize(rows, peaks)
        head = rows[:anchors].astype(ml_dtypes.bfloat16).tobytes()
        return head if anchors == len(rows) else head + self._quantize(rows[anchors:], peaks[anchors:])

    def decode(self, data: bytes | bytearray | memoryview, rows: int, base_pos: int) -> Rows:
        """The fp32 rows (rows, hidden). Raises BadRows for a wrong length or for values not finite."""
        data = memoryview(data)
        self.check_size(data.nbytes, rows, base_pos)
        if self.name == "none":
            out = np.frombuffer(data, "<f4").reshape(rows, self.hidden).astype(np.float32)
            _peaks(out)
            return out
        anchors = self._anchors(rows, base_pos)
        if anchors == 0:
            return self._dequantize(data, rows)
        split = 2 * self.hidden * anchors
        head = (
            np.frombuffer(data[:split], ml_dtypes.bfloat16).reshape(anchors, self.hidden).astype(np.float32)
        )
        _peaks(head)
        return (
            head
            if anchors == rows
            else np.concatenate([head, self._dequantize(data[split:], rows - anchors)])
        )

    def _anchors(self, rows: int, base_pos: int) -> int:
        """How many of the rows are written as bf16: they come first."""
        return rows if self.name == "bf16" else min(rows, max(0, ANCHORS - base_pos))

    def _quantize(self, rows: Rows, peaks: Rows) -> bytes:
        # A smaller scale would have too few bits to divide by; a row of zeros gets this one too.
        scales = np.maximum(peaks / np.float32(127), _SMALLEST_SCALE)
        scaled = rows / scales
        out = np.empty((len(rows), 4 + self.hidden), np.int8)
        out[:, :4] = scales.astype("<f4", copy=False).view(np.int8)
        out[:, 4:] = np.rint(scaled, out=scaled)
        return out.tobytes()

    def _dequantize(self, data: memoryview, rows: int) -> Rows:
        raw = np.frombuffer(data, np.int8).reshape(rows, 4 + self.hidden)
        scales = raw[:, :4].copy().view("<f4")
        if not ((scales >= 0) & (scales <= _LARGEST_SCALE)).all():
            raise BadRows("a scale of int8 rows is negative or not finite")
        out: Rows = raw[:, 4:] * scales
        return out


def _peaks(rows: Rows) -> Rows:
    """The largest magnitude of each row (n, 1). Raises BadRows where that is not finite."""
    peaks: Rows = np.abs(rows).max(axis=1, keepdims=True, initial=0)
    if not (peaks <= LARGEST).all():
        raise BadRows("rows hold values that are not finite")
    return peaks
