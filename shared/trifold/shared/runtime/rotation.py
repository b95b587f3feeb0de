"""The tables of cos and sin that rotate queries and keys."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trifold.shared.model.heads import HeadLayout
from trifold.shared.model.spec import Rope

Table = NDArray[np.float32]


def rotation(rope: Rope, positions: int) -> tuple[Table, Table]:
    """cos and sin (positions, half), with blanks up to the half of a HeadLayout.

    Angles are rounded to fp32, because the models were trained with angles rounded so.
    """
    frequencies = np.array(rope.inverse_frequencies, np.float32)
    angles = (np.arange(positions, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    half = HeadLayout(rope.dim, 0).half
    cos, sin = np.ones((positions, half), np.float32), np.zeros((positions, half), np.float32)
    cos[:, : len(frequencies)] = np.cos(angles) * rope.scale
    sin[:, : len(frequencies)] = np.sin(angles) * rope.scale
    return cos, sin
