"""Where to cut: the layer boundaries whose shares come nearest to a ratio."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, combinations

from trifold.shared.bundle.manifest import Cuts
from trifold.shared.errors import InvalidRequest

Shares = tuple[float, float, float]
"""Of cloud, edge and device, in percent."""


def parse_ratio(text: str) -> Shares:
    """ "70/20/10" as numbers. Raises InvalidRequest for anything else."""
    try:
        cloud, edge, device = (float(part) for part in text.split("/"))
    except ValueError as error:
        raise InvalidRequest(f"--ratio {text!r} is not three numbers such as 70/20/10") from error
    return cloud, edge, device


def parse_cuts(text: str) -> Cuts | None:
    """ "2/10" as cuts, "" as None. Raises InvalidRequest for anything else."""
    if not text:
        return None
    try:
        edge, cloud = (int(part) for part in text.split("/"))
        return Cuts(edge=edge, cloud=cloud)
    except ValueError as error:
        raise InvalidRequest(f"--cuts {text!r} is not two layer numbers such as 2/10") from error


def check_cuts(cuts: Cuts, layers: int) -> None:
    """Raises InvalidRequest for cuts that a model of so many layers does not have, or that leave no core."""
    if not cuts.edge < cuts.cloud <= layers:
        raise InvalidRequest(
            f"cuts before layers {cuts.edge} and {cuts.cloud} of {layers}: "
            f"the first must be less than the second, and the second at most {layers}"
        )


def nearest_cuts(edge: float, layers: Sequence[float], device: float, ratio: Shares) -> Cuts:
    """The cuts whose shares differ least from `ratio`, by the largest difference of the three tiers.

    `edge` and `device` are the weights of what these tiers hold besides layers: embedding and head. The cloud
    keeps at least one layer. Of equally good cuts, that with fewer layers on the edge, then on the device.
    """
    before = [0.0, *accumulate(layers)]

    def badness(cut: tuple[int, int]) -> tuple[float, int, int]:
        reached = _shares(edge, before, device, *cut)
        farthest = max(abs(share - wanted) for share, wanted in zip(reached, ratio, strict=True))
        return round(farthest, 9), cut[0], -cut[1]

    first, stop = min(combinations(range(len(layers) + 1), 2), key=badness)
    return Cuts(edge=first, cloud=stop)


def _shares(edge: float, before: Sequence[float], device: float, first: int, stop: int) -> Shares:
    whole = edge + before[-1] + device
    percent = 100 / whole
    tail = before[-1] - before[stop] + device
    return (before[stop] - before[first]) * percent, (edge + before[first]) * percent, tail * percent
