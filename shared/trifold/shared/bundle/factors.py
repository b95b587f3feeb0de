"""LoRA factors (arXiv 2106.09685): what fine-tuning adds to weights, as one safetensors file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trifold.shared.errors import InvalidRequest
from trifold.shared.model.safetensors import DTYPES, SafetensorsFile

Float = NDArray[np.float32]

_A: Final = ".lora_A"
_B: Final = ".lora_B"


@dataclass(frozen=True)
class LoraFactors:
    """Makes W (outputs, inputs) of each projection that it names W + alpha / rank · B A.

    `tensors` are by the checkpoint's name of a projection, such as model.layers.0.self_attn.o_proj, and
    `.lora_A` (rank, inputs) or `.lora_B` (outputs, rank), in fp32.

    Raises InvalidRequest naming the tensor that has another shape or dtype, no counterpart, or values that
    are not finite.
    """

    tensors: Mapping[str, Float]
    alpha: float
    rank: int

    def __post_init__(self) -> None:
        if not self.tensors or self.rank < 1 or not math.isfinite(self.alpha):
            what = f"{len(self.tensors)} tensors of rank {self.rank} with alpha {self.alpha}"
            raise InvalidRequest(f"{what} are no LoRA factors")
        for name, values in self.tensors.items():
            self._check(name, values)

    @classmethod
    def load(cls, path: Path) -> LoraFactors:
        """The factors in a safetensors file whose metadata name `alpha` and `rank`; 16 bits become fp32.

        Raises DamagedFile when it is not whole, InvalidRequest when it holds something else.
        """
        file = SafetensorsFile(path)
        for name, entry in file.entries.items():
            if entry.dtype not in DTYPES or len(entry.shape) != 2:
                raise InvalidRequest(f"{path}: {name} is {entry.dtype} {list(entry.shape)}, no LoRA factor")
        given = metadata(path)
        try:
            alpha, rank = float(given["alpha"]), int(given["rank"])
        except (KeyError, ValueError):
            raise InvalidRequest(f"{path}: the file's metadata must give alpha and rank as numbers") from None
        tensors = {name: file.rows(name, 0, entry.shape[0]) for name, entry in file.entries.items()}
        try:
            return cls(tensors, alpha, rank)
        except InvalidRequest as error:
            raise InvalidRequest(f"{path}: {error.message}") from None

    def digest(self) -> str:
        """SHA-256 over names, shapes, alpha, rank and values, lower-case hex."""
        shapes = {name: values.shape for name, values in self.tensors.items()}
        head = {"alpha": float(self.alpha), "rank": self.rank, "shapes": shapes}
        digest = hashlib.sha256(json.dumps(head, sort_keys=True, separators=(",", ":")).encode())
        for _, values in sorted(self.tensors.items()):
            digest.update(_bytes(values))
        return digest.hexdigest()

    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape of each weight that changes, by its name in the checkpoint."""
        projections = (name.removesuffix(_A) for name in self.tensors if name.endswith(_A))
        return {
            f"{name}.weight": (self.tensors[name + _B].shape[0], self.tensors[name + _A].shape[1])
            for name in projections
        }

    def merged(self, weight: str, rows: Float, start: int = 0) -> Float:
        """The rows from `start` on of a weight with its update added; of any other weight as they are.

        Computed in fp64 and rounded to fp32 once, so that equal factors give equal weights everywhere.
        """
        projection = weight.removesuffix(".weight")
        b = self.tensors.get(projection + _B)
        if b is None:
            return rows
        part = b[start : start + len(rows)].astype(np.float64)
        update = part @ self.tensors[projection + _A].astype(np.float64)
        merged: Float = (rows + self.alpha / self.rank * update).astype(np.float32)
        return merged

    def _check(self, name: str, values: Float) -> None:
        suffix = name[-len(_A) :]
        other, axis = {_A: (_B, 0), _B: (_A, 1)}.get(suffix, ("", 0))
        if not other:
            raise InvalidRequest(f"{name} is neither a projection's lora_A nor its lora_B")
        if name.removesuffix(suffix) + other not in self.tensors:
            raise InvalidRequest(f"{name} has no counterpart {other[1:]}")
        if values.dtype != np.float32 or values.ndim != 2 or values.shape[axis] != self.rank:
            raise InvalidRequest(f"{name} is {values.dtype} {values.shape}, not fp32 of rank {self.rank}")
        if not np.isfinite(values).all():
            raise InvalidRequest(f"{name} holds values that are not finite")


def metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself. Raises DamagedFile."""
    SafetensorsFile(path)
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    given = header.get("__metadata__", {})
    return {str(key): str(value) for key, value in given.items()} if isinstance(given, dict) else {}


def _bytes(values: Float) -> bytes:
    return values.astype("<f4", copy=False).tobytes()
