"""Tiling: how many rows a matrix product gets at a time, so that a row's bits do not depend on the others.

Libraries choose kernels by the number of rows. Measured with torch 2.13 on a CPU (AMD, AVX-512; MKL, oneDNN):

  fp32 products, also batched     of 1, of 2 and 3, of 4 and more rows: three kinds of bits. With several
                                  threads 5 to 7 and 9 to 11 are of another kind than 4, because a thread may
                                  be left with 3 or fewer. Multiples of 4 are all of one kind, wherever in the
                                  product a row stands, and however many products are in a batch.
  bf16 products                   all of one kind
  softmax, exp, sums, RMSNorm     over a row: all of one kind
  silu, sigmoid                   depend on where in memory a value lies: the last ones of a thread's share,
                                  up to 31 of them, are not computed with vectors

So products get multiples of 4 rows, and SiLU is made of exp. Where a processor's library does otherwise, as
the self-test finds out, every product gets one and the same number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Tiling:
    """Products of a `multiple` of rows; if `fixed`, of exactly so many."""

    multiple: int
    fixed: bool = False

    def __str__(self) -> str:
        return f"{'tiles' if self.fixed else 'multiples'} of {self.multiple}"

    def padded(self, rows: int) -> int:
        """The next multiple."""
        return -(-rows // self.multiple) * self.multiple

    def over(self, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """product(x) for x (…, rows, inputs), with rows of zeros where there are too few."""
        rows = x.shape[-2]
        blanks = self.padded(rows) - rows
        if blanks:
            x = pad(x, (0, 0, 0, blanks))
        if self.fixed and rows > self.multiple:
            out = torch.cat([product(tile) for tile in x.split(self.multiple, -2)], -2)  # type: ignore[no-untyped-call]
        else:
            out = product(x)
        return out[..., :rows, :] if blanks else out


TILINGS: Final[dict[str, tuple[Tiling, ...]]] = {
    "cpu": (Tiling(4), Tiling(16, fixed=True)),
    "cuda": (Tiling(16), Tiling(128, fixed=True)),
}
"""By kind of torch device, cheapest first: the first that passes the self-test is taken. Those of "cuda" are
what its kernels suggest (tensor cores take 16 rows at least); they have not been tried on a GPU yet."""
