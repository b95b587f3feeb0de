"""RowCache: the core's rows of texts seen before, on the site's disk. No torch."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trifold.shared.errors import BadRows
from trifold.shared.runtime.codec import RowCodec

Rows = NDArray[np.float32]


class RowCache:
    """Rows (length, hidden) by the token ids (length,) of their sequence, written with the codec.

    Good as long as nothing before the cut changes: where only the device is trained. The rows give the text
    away, so they stay at the site, and those of another bundle than this one are deleted: `folder` is the
    cache's own.
    """

    def __init__(self, folder: Path, codec: RowCodec, serving_digest: str) -> None:
        self.folder = folder / serving_digest
        self.codec = codec
        self.folder.mkdir(parents=True, exist_ok=True)
        for other in folder.iterdir():
            if other.is_dir() and other != self.folder:
                shutil.rmtree(other)
            elif other.is_file():
                other.unlink()

    def get(self, tokens: NDArray[np.int64]) -> Rows | None:
        """The rows of a sequence, if they are here and whole."""
        try:
            data = self._path(tokens).read_bytes()
            return self.codec.decode(data, len(tokens), 0)
        except (FileNotFoundError, BadRows):
            return None

    def put(self, tokens: NDArray[np.int64], rows: Rows) -> Rows:
        """Keep the rows of a sequence; returns them as `get` will, which may differ in the last bit."""
        data = self.codec.encode(rows, 0)
        path = self._path(tokens)
        part = path.with_suffix(".part")
        part.write_bytes(data)
        part.replace(path)
        return self.codec.decode(data, len(tokens), 0)

    def _path(self, tokens: NDArray[np.int64]) -> Path:
        return self.folder / f"{hashlib.sha256(tokens.astype('<i8').tobytes()).hexdigest()}.rows"
