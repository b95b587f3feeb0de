"""Error feedback: what packing lost of one update is added to the next (arXiv 1809.07599, 1901.09847)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from trifold.shared.errors import DamagedFile
from trifold.shared.federation import durable
from trifold.shared.federation.packing import Arrays, Kind, pack, shapes_of, unpack


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
    """The residual of one site in one run, on the site's disk.

    A proposal waits in `pending` until the server says that its round has taken it; only then does its
    residual become the one that the next update is added to. A crash at any point leaves one or the other.
    """

    def __init__(self, folder: Path, run: str, site: str) -> None:
        self._settled = folder / run / site / "settled.safetensors"
        self._pending = folder / run / site / "pending.safetensors"

    def settle(self, acknowledged: int) -> None:
        """Take note of the last round whose update the server has taken from this site; 0 for none."""
        pending = Proposal.load(self._pending)
        if pending and pending.round == acknowledged:
            durable.move(self._pending, self._settled)
            return
        settled = Proposal.load(self._settled)
        if settled and settled.round > acknowledged:
            # The server went back behind a round that it had acknowledged, and lost what it had taken.
            self._settled.unlink()

    def proposed(self, number: int, base: str) -> Proposal | None:
        """What was proposed for this round already, from the same factors: to be sent again as it is."""
        pending = Proposal.load(self._pending)
        return pending if pending and (pending.round, pending.base) == (number, base) else None

    def propose(
        self,
        number: int,
        base: str,
        update: Mapping[str, NDArray[np.float32]],
        kind: Kind,
        report: dict[str, Any],
    ) -> Proposal:
        """Pack an update with what earlier ones lost, and keep what this one loses as pending.

        Raises InvalidRequest for values that are not finite; nothing is kept then.
        """
        settled = Proposal.load(self._settled)
        residual = settled.residual if settled else {}
        whole = {
            name: array + residual[name] if name in residual else array for name, array in update.items()
        }
        data = pack(whole, kind)
        arrived = unpack(data, shapes_of(whole), kind)
        lost = {name: whole[name] - arrived[name] for name in whole}
        proposal = Proposal(number, base, data, report, lost)
        proposal.save(self._pending)
        return proposal
