"""The gate: an update that could spoil a round is refused, and its site named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from trifold.shared.errors import InvalidRequest
from trifold.shared.federation.packing import Arrays, Kind, Shapes, unpack


@dataclass
class Admission:
    """Updates that passed, and why the others did not, by site."""

    updates: dict[str, Arrays] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Gate:
    """Lets through updates of `shapes` and `kind` whose values are finite and whose norm is in line.

    The norm may be `ratio` times the median of the other sites' in the round, and never above `bound`. The
    own norm does not count for the median: one of few could otherwise be any number of times larger. Of two
    sites, nothing says whether the loud one or the faint is out of line: they are held to the bound alone.
    """

    shapes: Shapes
    kind: Kind
    ratio: float
    bound: float

    def admit(self, packed: Mapping[str, bytes]) -> Admission:
        """Sort the packed updates of a round, by site."""
        result, norms = Admission(), dict[str, float]()
        for site, data in sorted(packed.items()):
            try:
                result.updates[site] = unpack(data, self.shapes, self.kind)
                norms[site] = self._norm(result.updates[site])
            except InvalidRequest as error:
                result.refused[site] = error.message
        for site, reason in self._out_of_line(norms):
            result.refused[site] = reason
        result.updates = {site: u for site, u in result.updates.items() if site not in result.refused}
        return result

    def _norm(self, update: Arrays) -> float:
        """The Euclidean norm. Raises InvalidRequest when it is above the bound or none at all."""
        for name, array in update.items():
            if np.isnan(array).any():
                raise InvalidRequest(f"{name} holds NaN")
            if np.isinf(array).any():
                raise InvalidRequest(f"{name} holds an infinite value")
        norm = float(np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in update.values())))
        if norm > self.bound:
            raise InvalidRequest(f"the norm {norm:.3g} is above the bound {self.bound:g}")
        return norm

    def _out_of_line(self, norms: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        for site, norm in norms.items():
            others = [other for name, other in norms.items() if name != site]
            usual = median(others) if len(others) > 1 else 0.0
            if usual > 0 and norm > self.ratio * usual:
                yield site, f"the norm {norm:.3g} is {norm / usual:.0f} times that of the other sites"
