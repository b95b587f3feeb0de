"""When somebody who finds every place taken should ask again."""

from __future__ import annotations

from typing import Final

_WEIGHT: Final = 1 / 16
"""Of the newest stay in the mean."""

_SHORTEST: Final = 0.5
_LONGEST: Final = 30.0


class Turnover:
    """The running `mean` of how many seconds places are held: after so long, every one has become free."""

    def __init__(self) -> None:
        self.mean = 1.0

    def note(self, seconds: float) -> None:
        """A place was held for so long."""
        self.mean += (seconds - self.mean) * _WEIGHT

    @property
    def retry_after(self) -> float:
        """Seconds."""
        return min(max(self.mean, _SHORTEST), _LONGEST)
