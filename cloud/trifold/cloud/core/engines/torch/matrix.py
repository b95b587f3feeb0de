"""Matrix: a weight, or a stack of them, in the dtype that it is kept in."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import linear

from trifold.cloud.core.engines.torch.tiling import Tiling
from trifold.shared.settings import WeightFormat

_AT_A_TIME: Final = 2**18
"""Weights that a CPU turns from int8 into floats at a time: 1 MiB of them, which its caches hold."""


class Matrix:
    """(outputs, inputs), or (…, outputs, inputs) of which `of` picks one; rows multiply it from the left.

    int8 weights are whole multiples of a scale of their output, 1/127 of its largest weight. They become
    floats for each product, which saves memory but no time: torch has no quick product of int8 and floats.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor | None, compute: torch.dtype, bias: Tensor | None = None
    ) -> None:
        """`scale` (…, outputs) for int8 weights; `bias` (outputs). Products are of `compute`."""
        self.weight = weight
        self.scale = scale
        self.bias = bias
        self.compute = compute

    @classmethod
    def blank(
        cls,
        *shape: int,
        weights: WeightFormat,
        compute: torch.dtype,
        device: torch.device,
        bias: bool = False,
    ) -> Matrix:
        """To be filled by `put`; the bias is 0."""
        if weights == "int8":
            weight = torch.empty(shape, dtype=torch.int8, device=device)
            scale = torch.empty(shape[:-1], device=device)
        else:
            weight, scale = torch.empty(shape, dtype=compute, device=device), None
        return cls(weight, scale, compute, torch.zeros(shape[-2], device=device) if bias else None)

    def put(self, values: Tensor, place: tuple[int | slice, ...]) -> None:
        """Weights (outputs, inputs) into a place that leaves those two."""
        if self.scale is None:
            self.weight[place] = values.to(self.weight.device)
            return
        values = values.to(self.weight.device, torch.float32)
        scale = values.abs().amax(-1) / 127
        scale[scale == 0] = 1
        self.weight[place] = (values / scale[:, None]).round().to(torch.int8)
        self.scale[place] = scale

    def of(self, index: int) -> Matrix:
        """One of a stack."""
        scale = None if self.scale is None else self.scale[index]
        return Matrix(self.weight[index], scale, self.compute)

    def product(self, x: Tensor, tiling: Tiling) -> Tensor:
        """Rows x (rows, inputs) times the matrix, and the bias: fp32 (rows, outputs)."""
        out = tiling.over(x.to(self.compute), self._product).float()
        if self.scale is not None:
            out = out * self.scale
        return out if self.bias is None else out + self.bias

    def _product(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return linear(x, self.weight)
        outputs, inputs = self.weight.shape
        step = max(1, _AT_A_TIME // inputs) if x.device.type == "cpu" else outputs
        pieces = self.weight.split(step)  # type: ignore[no-untyped-call]
        return torch.cat([linear(x, piece.to(self.compute)) for piece in pieces], -1)
