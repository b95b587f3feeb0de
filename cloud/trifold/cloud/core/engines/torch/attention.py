"""Paged attention: queries of many sessions over the blocks of each.

A tile of queries meets one block of keys at a time, always whole: what lies behind a query is masked. The
parts of a softmax that come of it are put together in the order of the blocks (as in FlashAttention-2, arXiv
2307.08691), so a query's sums are cut at the same places however long its session is and whatever else is in
the batch.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from trifold.cloud.core.engines.torch.places import Places, Tiles
from trifold.cloud.core.kv.blocks import BLOCK
from trifold.shared.model.spec import GroupedAttention, LatentAttention

_LOWEST: Final = -1e30
"""Below any score: of a block that a query sees nothing of."""

_ROOM: Final = {torch.float32: np.int32, torch.bfloat16: np.int16}


class Pages:
    """Keys and values of one layer: (blocks, key heads, BLOCK, size).

    Where `shared` is not 0 there are no values: they are the first `shared` entries of the keys, as in
    attention over a latent.
    """

    def __init__(
        self,
        blocks: int,
        heads: int,
        size: int,
        *,
        shared: int = 0,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.keys = _zeros((blocks, heads, BLOCK, size), dtype, device)
        self._values = None if shared else _zeros((blocks, heads, BLOCK, size), dtype, device)
        self._shared = shared

    def read(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of some blocks: (blocks, key heads, BLOCK, size)."""
        keys = self.keys[block]
        return keys, keys[..., : self._shared] if self._values is None else self._values[block]

    def copy(self, block: int) -> tuple[Tensor, ...]:
        """What is in a block."""
        return tuple(page[block].clone() for page in self._all)

    def paste(self, block: int, copied: tuple[Tensor, ...]) -> None:
        for page, one in zip(self._all, copied, strict=True):
            page[block] = one

    @property
    def _all(self) -> list[Tensor]:
        return [page for page in (self.keys, self._values) if page is not None]

    def write(self, places: Places, keys: Tensor, values: Tensor | None) -> None:
        """Of the rows of a batch: (rows, key heads, size).

        Infinite ones become large ones and NaN becomes 0: what is masked is multiplied by 0, and that must be
        0, or a row would depend on those behind it, and on whoever had the block before.
        """
        for page, rows in ((self.keys, keys), (self._values, values)):
            if page is not None and rows is not None:
                page[places.block, :, places.offset] = torch.nan_to_num(rows.to(page.dtype))


def values_of_position(spec: GroupedAttention | LatentAttention) -> int:
    """How many values a layer keeps of a position."""
    if isinstance(spec, GroupedAttention):
        return 2 * spec.kv_heads * spec.head_dim
    return spec.kv_rank + spec.rope_dim


def pages_of(
    spec: GroupedAttention | LatentAttention, blocks: int, dtype: torch.dtype, device: torch.device
) -> Pages:
    """For the keys and values of a layer, or for the latent and its rotated key."""
    if isinstance(spec, GroupedAttention):
        return Pages(blocks, spec.kv_heads, spec.head_dim, dtype=dtype, device=device)
    size = spec.kv_rank + spec.rope_dim
    return Pages(blocks, 1, size, shared=spec.kv_rank, dtype=dtype, device=device)


def attend(queries: Tensor, pages: Pages, places: Places, scale: float) -> Tensor:
    """softmax(queries · keys · scale) · values of queries (rows, heads, size): (rows, heads, value size)."""
    out = [_attend(queries, pages, tiles, scale) for tiles in places.tiles]
    return (torch.cat(out) if len(out) > 1 else out[0])[places.order]


def _attend(queries: Tensor, pages: Pages, tiles: Tiles, scale: float) -> Tensor:
    """(tiles · size, heads, value size)"""
    count, size = tiles.rows.shape
    heads, key_heads = queries.shape[1], pages.keys.shape[1]
    keys, values = pages.read(tiles.block)
    # (tiles, key heads, size · group, width of a key): the heads of a group have one key.
    rows = queries[tiles.rows].view(count, size, key_heads, heads // key_heads, -1).transpose(1, 2)
    rows = rows.reshape(count, key_heads, size * (heads // key_heads), -1).to(pages.keys.dtype)

    scores = _product(rows[tiles.tile], keys.mT) * scale
    behind = (
        tiles.first[:, None, None] + torch.arange(BLOCK, device=rows.device)
        > tiles.positions[tiles.tile, :, None]
    )
    by_row = scores.view(len(scores), key_heads, size, -1, BLOCK)
    by_row.masked_fill_(behind[:, None, :, None], float("-inf"))
    best = scores.amax(-1, keepdim=True).clamp_min(_LOWEST)
    weights = (scores - best).exp()
    sums = weights.sum(-1, keepdim=True)
    parts = _product(weights.to(values.dtype), values)

    top = best[:count].clone()
    ends = _ends(tiles.counts)
    for start, pairs in ends[1:]:
        top[:pairs] = torch.maximum(top[:pairs], best[start : start + pairs])
    total, out = torch.zeros_like(top), torch.zeros_like(parts[:count])
    for start, pairs in ends:
        step = slice(start, start + pairs)
        share = (best[step] - top[:pairs]).exp()
        total[:pairs] += share * sums[step]
        out[:pairs] += share * parts[step]
    out = (out / total).view(count, key_heads, size, heads // key_heads, -1).transpose(1, 2)
    return out.reshape(count * size, heads, -1)


def _ends(counts: list[int]) -> list[tuple[int, int]]:
    """Where each step's pairs begin, and how many they are."""
    starts = [sum(counts[:step]) for step in range(len(counts))]
    return [*zip(starts, counts, strict=True)]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """fp32 (pairs, heads, …) of matrices in fp32 or bf16."""
    shape = (*left.shape[:-1], right.shape[-1])
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    if left.device.type == "cuda" and left.dtype != torch.float32:
        return torch.bmm(left, right, out_dtype=torch.float32).view(shape)
    return torch.bmm(left.float(), right.float()).view(shape)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU of memory that the system gives when it is written to first, not all of it at once."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(shape, _ROOM[dtype])).view(dtype)
    return torch.zeros(shape, dtype=dtype, device=device)
