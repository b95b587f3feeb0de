"""How fast a model would run: a roofline of machines limited by arithmetic or memory, and of links.

    a token          max(operations / flops, bytes read / memory bandwidth)
    a prompt's chunk max(rows · operations / flops, all weight bytes / memory bandwidth)
    a link           rtt, once for there and back, + bytes / link bandwidth

The bytes that a token reads are those of its active weights and of the KV of `context` positions. A prompt
runs in equal chunks through a pipeline of tiers and links: every stage once, then for each further chunk the
slowest stage once more. Where the whole model runs on one tier, only token ids cross links, whose bytes are
neglected, and after the prompt nobody waits for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from math import ceil
from operator import add
from typing import Final, Literal

from trifold.cloud.split.footprint import Footprint
from trifold.cloud.split.profiles import TierProfiles
from trifold.cloud.split.traffic import LinkName, Traffic
from trifold.shared.bundle.manifest import TIERS, Tier
from trifold.shared.model.spec import Part

CHUNK: Final = 512
"""Most rows of a step on the wire."""

_PATHS: Final[dict[Tier, tuple[LinkName, ...]]] = {
    "device": (),
    "edge": ("device_edge",),
    "cloud": ("device_edge", "edge_cloud"),
}


class Prediction(Part):
    """Seconds to the first token and for each one after it, when the model is split or whole in one tier."""

    place: Literal["split"] | Tier
    first_token: float
    token: float
    fits: bool


@dataclass(frozen=True)
class Roofline:
    """Predicts for these tiers, a prompt of so many tokens, and so many positions in KV."""

    tiers: TierProfiles
    prompt: int
    context: int

    def predict(
        self, footprints: Mapping[Tier, Footprint], traffic: Mapping[LinkName, Traffic], *, attends: bool
    ) -> tuple[Prediction, ...]:
        """The split, then the whole model on each tier."""
        split = self.split(footprints, traffic, attends=attends)
        return split, *(self.whole(footprints, tier) for tier in TIERS)

    def split(
        self, footprints: Mapping[Tier, Footprint], traffic: Mapping[LinkName, Traffic], *, attends: bool
    ) -> Prediction:
        """Each tier with its part. A device that attends works on every row of the prompt, else on one."""
        links = [(self.tiers.link(name), traffic[name]) for name in traffic]
        delay = sum(link.rtt for link, _ in links)
        crossing = sum(carried.token / link.bandwidth for link, carried in links)
        device = self._prefill(footprints["device"], "device", self._rows if attends else 1)
        stages = [
            *(carried.prompt / self._chunks / link.bandwidth for link, carried in links),
            self._prefill(footprints["edge"], "edge", self._rows),
            self._prefill(footprints["cloud"], "cloud", self._rows),
            device if attends else 0.0,
        ]
        last = 0.0 if attends else device
        return Prediction(
            place="split",
            first_token=delay + sum(stages) + (self._chunks - 1) * max(stages) + last,
            token=delay + crossing + sum(self._decode(footprints[tier], tier) for tier in TIERS),
            fits=all(self.fits(footprints[tier], tier) for tier in TIERS),
        )

    def whole(self, footprints: Mapping[Tier, Footprint], tier: Tier) -> Prediction:
        """The parts of all tiers on one."""
        footprint = reduce(add, footprints.values())
        delay = sum(self.tiers.link(name).rtt for name in _PATHS[tier])
        return Prediction(
            place=tier,
            first_token=delay + self._chunks * self._prefill(footprint, tier, self._rows),
            token=self._decode(footprint, tier),
            fits=self.fits(footprint, tier),
        )

    def fits(self, footprint: Footprint, tier: Tier) -> bool:
        return footprint.memory(self.context) <= self.tiers.machine(tier).memory

    @property
    def _chunks(self) -> int:
        return ceil(self.prompt / CHUNK)

    @property
    def _rows(self) -> int:
        return ceil(self.prompt / self._chunks)

    def _decode(self, footprint: Footprint, tier: Tier) -> float:
        machine = self.tiers.machine(tier)
        read = footprint.read_bytes + footprint.kv_bytes * self.context
        return max(footprint.operations(self.context) / machine.flops, read / machine.bandwidth)

    def _prefill(self, footprint: Footprint, tier: Tier, rows: int) -> float:
        machine = self.tiers.machine(tier)
        # A row attends to half of the prompt on average.
        operations = rows * footprint.operations(self.prompt // 2)
        return max(operations / machine.flops, footprint.weight_bytes / machine.bandwidth)
