"""HeadLayout: how the values of an attention head lie in a shard, and so how large a key or value is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trifold.shared.model.spec import GroupedAttention, LatentAttention

Order = NDArray[np.intp]
"""Where each value comes from: an index, or BLANK."""

BLANK: Final = -1

_HALF_MULTIPLE: Final = 8
_SIZE_MULTIPLE: Final = 16
"""What GroupQueryAttention on CPU asks of half the rotated values, and of a head."""


@dataclass(frozen=True)
class HeadLayout:
    """Both halves of the `rotated` values, each filled with blanks, then `plain` ones, then blanks."""

    rotated: int
    plain: int

    @classmethod
    def of(cls, attention: GroupedAttention | LatentAttention) -> HeadLayout:
        """That of a head, or, in latent attention, of the latent and the rotated key that all heads share."""
        if isinstance(attention, GroupedAttention):
            return cls(attention.head_dim, 0)
        return cls(attention.rope_dim, attention.kv_rank)

    @property
    def half(self) -> int:
        """Half the rotated values: the width of the tables of cos and sin."""
        return _rounded(self.rotated // 2, _HALF_MULTIPLE)

    @property
    def size(self) -> int:
        """Values of a head."""
        return _rounded(2 * self.half + self.plain, _SIZE_MULTIPLE)

    def turned(self, places: Order) -> Order:
        """The rotated part of a head whose rotated values come from `places`."""
        first, second = np.split(places, 2)
        return np.concatenate([filled(first, self.half), filled(second, self.half)])

    def order(self, rotated: Order, plain: Order) -> Order:
        """A whole head, given where the values of both kinds come from."""
        return filled(np.concatenate([self.turned(rotated), plain]), self.size)


def key_heads(attention: GroupedAttention | LatentAttention) -> int:
    """How many keys and values a position has: latent attention has one for all heads."""
    return attention.kv_heads if isinstance(attention, GroupedAttention) else 1


def kept_heads(attention: GroupedAttention | LatentAttention) -> int:
    """How many of both together a cache keeps of a position: a latent is a key and a value."""
    return 2 * attention.kv_heads if isinstance(attention, GroupedAttention) else 1


def filled(order: Order, size: int) -> Order:
    """An order with blanks up to `size`."""
    return np.concatenate([order, np.full(size - len(order), BLANK, np.intp)])


def _rounded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
