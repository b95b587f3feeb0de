"""Error feedback: what packing lost of one update is added to the next (arXiv 1809.07599, 1901.09847)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from trifold.shared import durable
from trifold.shared.errors import DamagedFile
from trifold.shared.federation.packing import Arrays, Kind, pack, shapes_of, unpack

_LATEST: Final = 4
"""Proposals that are kept beside the one taken: more than rounds are on their way to a site at a time."""


@dataclass(frozen=True)
class Proposal:
    """The packed update `data` of a round, made from the factors with digest `base`, and what to tell of it.

    `residual` is what packing lost, by name.
    """

    round: int
    base: str
    data: bytes
    report: dict[str, Any]
    residual: Arrays = field(default_factory=dict)

    def save(self, path: Path) -> None:
        described = {"round": self.round, "base": self.base, "report": self.report}
        tensors: dict[str, NDArray[Any]] = {
            f"residual/{name}": array for name, array in self.residual.items()
        }
        tensors["data"] = np.frombuffer(self.data, np.uint8)
        durable.write(path, save(tensors, {"proposal": json.dumps(described)}))

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """None where there is no such file. Raises DamagedFile."""
        if not path.exists():
            return None
        try:
            with safe_open(path, "np") as file:
                described = json.loads(file.metadata()["proposal"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DamagedFile(
                f"{path}: is not a whole proposal ({error}); delete it, and the training goes on without"
            ) from error
        data = tensors.pop("data").tobytes()
        residual = {name.removeprefix("residual/"): array for name, array in tensors.items()}
        return cls(described["round"], described["base"], data, described["report"], residual)


class ErrorFeedback:
    """The residuals of one site in one run, on the site's disk.

    Each proposal is kept with its residual under the number of its round. An update is added to the residual
    of the proposal that the server says it has taken last, whatever was asked in between: so a round that
    comes late, or once more after the server went back, takes nothing from the others.
    """

    def __init__(self, folder: Path, run: str, site: str) -> None:
        self._folder = folder / run / site
        self._acknowledged = 0

    def settle(self, acknowledged: int) -> None:
        """Take note of the last round whose update the server has taken from this site; 0 for none."""
        self._acknowledged = acknowledged

    def proposed(self, number: int, base: str) -> Proposal | None:
        """What was proposed for this round already, from the same factors: to be sent again as it is."""
        proposal = Proposal.load(self._path(number))
        return proposal if proposal and proposal.base == base else None

    def propose(
        self,
        number: int,
        base: str,
        update: Mapping[str, NDArray[np.float32]],
        kind: Kind,
        report: dict[str, Any],
    ) -> Proposal:
        """Pack an update with what earlier ones lost, and keep what this one loses.

        Raises InvalidRequest for values that are not finite; nothing is kept then.
        """
        taken = Proposal.load(self._path(self._acknowledged))
        residual = taken.residual if taken else {}
        whole = {
            name: array + residual[name] if name in residual else array for name, array in update.items()
        }
        data = pack(whole, kind)
        arrived = unpack(data, shapes_of(whole), kind)
        lost = {name: whole[name] - arrived[name] for name in whole}
        proposal = Proposal(number, base, data, report, lost)
        proposal.save(self._path(number))
        self._tidy()
        return proposal

    def _tidy(self) -> None:
        """Delete what neither the server can name again nor a round that is late may still start from."""
        kept = self._folder.glob("[0-9]*.safetensors")
        for path in sorted(kept, key=lambda path: (path.stat().st_mtime_ns, int(path.stem)))[:-_LATEST]:
            if path != self._path(self._acknowledged):
                path.unlink()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}.safetensors"
