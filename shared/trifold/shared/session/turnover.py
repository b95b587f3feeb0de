"""When somebody who finds every place taken should ask again."""

from __future__ import annotations

from typing import Final

_WEIGHT: Final = 1 / 16
"""Of the newest stay in the mean."""

_SHORTEST: Final = 0.5
_LONGEST: Final = 30.0


class Turnover:
    """A running mean of how long places are held."""

    def __init__(self) -> None:
        self._mean = 1.0

    def note(self, seconds: float) -> None:
        """A place was held for so long."""
        self._mean += (seconds - self._mean) * _WEIGHT

    @property
    def seconds(self) -> float:
        """After so many every place has become free, within reason."""
        return min(max(self._mean, _SHORTEST), _LONGEST)
