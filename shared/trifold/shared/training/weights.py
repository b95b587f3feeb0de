"""Weights: the tensors of a slice as transformers' modules want them."""

from __future__ import annotations

from typing import Final

import torch

from trifold.shared.errors import UnsupportedModel
from trifold.shared.model.names import MoeNames
from trifold.shared.model.spec import MoeFfn
from trifold.shared.training.slices import FloatSlice

_FP32: Final = ".e_score_correction_bias"
"""The bias for the choice of experts, which transformers keeps in fp32 whatever the model's dtype."""


class Weights:
    """Tensors, each taken once, by their names in transformers' model of the whole checkpoint.

    transformers 5 holds the experts of a layer in two tensors, the checkpoint has three for each; and what
    Mixtral's checkpoint calls "block_sparse_moe" is "mlp" there as well.
    """

    def __init__(self, floats: FloatSlice, dtype: torch.dtype, device: torch.device) -> None:
        self._floats = floats
        self._tensors = floats.tensors()
        self._dtype = dtype
        self._device = device

    def take(self, name: str) -> torch.Tensor:
        """Raises UnsupportedModel when the slice has no such tensor."""
        tensor = self._find(name)
        return tensor.to(self._device, torch.float32 if name.endswith(_FP32) else self._dtype)

    def check_empty(self) -> None:
        """Raises UnsupportedModel naming a tensor that nobody took."""
        if self._tensors:
            raise UnsupportedModel(
                f"{self._floats.folder.path}: transformers' {self._floats.spec.family} has no place for "
                f"{min(self._tensors)}; this model cannot be trained"
            )

    def _find(self, name: str) -> torch.Tensor:
        if name == "lm_head.weight":
            return self._pop(self._floats.names.head)
        if ".mlp." not in name:
            return self._pop(name)
        index = int(name.split(".")[2])
        ffn, at = self._floats.spec.layers[index].ffn, self._floats.names.layer(index).ffn
        if not isinstance(ffn, MoeFfn) or not isinstance(at, MoeNames):
            return self._pop(name)
        experts = [at.expert(expert) for expert in range(ffn.experts)]
        match name.split(".mlp.")[1]:
            case "gate.weight":
                return self._pop(at.router)
            case "experts.gate_up_proj":
                return torch.stack([torch.cat([self._pop(e.gate), self._pop(e.up)]) for e in experts])
            case "experts.down_proj":
                return torch.stack([self._pop(e.down) for e in experts])
        return self._pop(name)

    def _pop(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise UnsupportedModel(
                f"{self._floats.folder.path}: transformers' {self._floats.spec.family} wants {name}, which "
                "this model has not; it cannot be trained"
            )
        return self._tensors.pop(name)
