"""TrainingDiverged. No torch."""

from __future__ import annotations

from typing import Final

from trifold.shared.errors import TrifoldError

ADVICE: Final = "the training has diverged; take a lower learning rate or a longer warm-up"


class TrainingDiverged(TrifoldError):
    """A loss, a gradient or a row is not finite."""

    reason = "TRAINING_DIVERGED"
    exit_code = 65
