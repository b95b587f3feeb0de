"""The state of a run after a round, in one file: a stopped run goes on from the last of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from trifold.shared import durable
from trifold.shared.errors import DamagedFile
from trifold.shared.federation.packing import Arrays

_NAME: Final = "round-{:06}.safetensors"

_PATTERN: Final = "round-*.safetensors"

_KEPT: Final = 2
"""The last, and one before it for whoever wants to look back."""


@dataclass(frozen=True)
class Checkpoint:
    """After `round` rounds: the factors, what the strategy remembers, and what the next round needs to know.

    `model` says what all sites must hold; `random` is the state of the generator that samples sites; `taken`
    is the last round whose update was taken, by site; `row` is what the log tells of this round.
    """

    round: int
    model: dict[str, str]
    factors: Arrays
    server: dict[str, NDArray[Any]]
    random: dict[str, Any]
    taken: dict[str, int] = field(default_factory=dict)
    row: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, model: dict[str, str], factors: Arrays, seed: int) -> Self:
        return cls(0, model, factors, {}, dict(np.random.default_rng(seed).bit_generator.state))

    def generator(self) -> np.random.Generator:
        generator = np.random.default_rng()
        generator.bit_generator.state = self.random
        return generator

    def save(self, folder: Path) -> None:
        tensors = {f"factors/{name}": array for name, array in self.factors.items()}
        tensors |= {f"server/{name}": array for name, array in self.server.items()}
        rest = {
            "round": self.round,
            "model": self.model,
            "random": self.random,
            "taken": self.taken,
            "row": self.row,
        }
        durable.write(folder / _NAME.format(self.round), save(tensors, {"run": json.dumps(rest)}))
        for old in sorted(folder.glob(_PATTERN))[:-_KEPT]:
            old.unlink()

    @classmethod
    def last(cls, folder: Path) -> Self | None:
        """The newest of a folder; None where there is none. Raises DamagedFile."""
        files = sorted(folder.glob(_PATTERN))
        return cls.load(files[-1]) if files else None

    @classmethod
    def load(cls, path: Path) -> Self:
        try:
            with safe_open(path, "np") as file:
                rest = json.loads(file.metadata()["run"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(
                rest["round"],
                rest["model"],
                _part(tensors, "factors/"),
                _part(tensors, "server/"),
                rest["random"],
                rest["taken"],
                rest["row"],
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DamagedFile(
                f"{path}: is no checkpoint of a run ({error}); delete it to go back a round"
            ) from error


def _part(tensors: dict[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
