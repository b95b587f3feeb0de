"""Slots: which session has which part of the caches, whose memory is one piece for all of them."""

from __future__ import annotations

from typing import Final

from trifold.cloud.core.engines.tensorrt.precision import COMPUTED, NUMPY, Precision
from trifold.cloud.core.engines.tensorrt.profiles import Limits
from trifold.shared.errors import Overloaded, PromptTooLong, UnknownSession
from trifold.shared.model.heads import HeadLayout
from trifold.shared.model.spec import GroupedAttention, ModelSpec

_RETRY_SECONDS: Final = 1.0


def session_bytes(spec: ModelSpec, layers: range, slots: int, precision: Precision) -> int:
    """What the caches of a session take: keys and values, or the latent that is both."""
    attentions = [spec.layers[layer].attention for layer in layers]
    values = sum(
        HeadLayout.of(one).size * (2 * one.kv_heads if isinstance(one, GroupedAttention) else 1)
        for one in attentions
    )
    return values * slots * int(NUMPY[COMPUTED[precision]].itemsize)


class Cache:
    """Keys and values of the positions [0, have), with room for `capacity`, in a slot of an engine."""

    def __init__(self, capacity: int, slot: int) -> None:
        self.capacity = capacity
        self.have = 0
        self.slot = slot


class Slots:
    """As many as a batch may have sessions. The lowest go first: a batch spans all up to its last one."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held: list[Cache | None] = [None] * limits.sessions

    def take(self, capacity: int) -> Cache:
        """Raises PromptTooLong, or Overloaded when all are taken."""
        if capacity > self._limits.positions:
            raise PromptTooLong(
                f"{capacity} positions: the engine was built for {self._limits.positions} in a session"
            )
        for slot, held in enumerate(self._held):
            if held is None:
                cache = self._held[slot] = Cache(capacity, slot)
                return cache
        raise Overloaded(
            f"the engine was built for {self._limits.sessions} sessions, and holds as many",
            retry_after=_RETRY_SECONDS,
        )

    def give_back(self, cache: Cache) -> None:
        if self._held[cache.slot] is cache:
            self._held[cache.slot] = None

    def check(self, cache: Cache) -> None:
        """Raises UnknownSession for a cache whose slot another session has by now."""
        if self._held[cache.slot] not in (cache, None):
            raise UnknownSession("the session's cache was given up")

    def free_positions(self, count: int) -> list[int]:
        """For each of the first slots, where a row that nobody wants can be written."""
        return [held.have if held else 0 for held in self._held[:count]]
