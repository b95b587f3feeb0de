"""How the values of a head lie in a shard, and how they are rotated."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trifold.shared.model.heads import BLANK, HeadLayout
from trifold.shared.model.spec import Rope
from trifold.shared.runtime.rotation import rotation

layouts = st.builds(
    HeadLayout, rotated=st.integers(1, 80).map(lambda half: 2 * half), plain=st.integers(0, 200)
)


@given(layouts)
def test_every_value_of_a_head_has_one_place_and_pairs_lie_half_a_rotation_apart(layout: HeadLayout) -> None:
    rotated = np.arange(layout.rotated)
    order = layout.order(rotated, np.arange(layout.rotated, layout.rotated + layout.plain))
    assert len(order) == layout.size
    assert sorted(order[order != BLANK]) == list(range(layout.rotated + layout.plain))
    first, second = order[: layout.half], order[layout.half : 2 * layout.half]
    there = first != BLANK
    assert (second[there] - first[there] == layout.rotated // 2).all()
    assert (second[~there] == BLANK).all()


@given(layouts)
def test_a_layout_is_what_the_engine_takes(layout: HeadLayout) -> None:
    assert layout.half % 8 == 0
    assert layout.size % 16 == 0


def test_the_tables_turn_each_pair_by_its_frequency_and_leave_blanks_alone() -> None:
    rope = Rope(dim=6, kind="default", inverse_frequencies=(1.0, 0.1, 0.01), scale=1.5)
    cos, sin = rotation(rope, 50)
    assert cos.shape == sin.shape == (50, 8)
    assert np.allclose(cos[7, :3], 1.5 * np.cos([7, 0.7, 0.07]), atol=1e-6)
    assert np.allclose(sin[7, :3], 1.5 * np.sin([7, 0.7, 0.07]), atol=1e-6)
    assert (cos[:, 3:] == 1).all()
    assert (sin[:, 3:] == 0).all()
