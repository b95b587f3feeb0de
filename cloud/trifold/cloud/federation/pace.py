"""Flower's waiting for the parts of an answer, bounded: Flower 1.41 has no settings for it."""

from __future__ import annotations

from typing import Any, Final

from flwr.supercore.inflatable.inflatable_utils import pull_objects

_AGAIN: Final = 0.05
"""Seconds until a part of an answer that is still on its way is asked for again (Flower: 1), then twice."""


def shorten() -> None:
    """For this process, from now on: the pause would cost a round a second whenever an answer is early."""
    _defaults()["initial_backoff"] = _AGAIN


def wait_at_most(seconds: float) -> None:
    """From now on, for the parts of one answer: a site may have told of one that it never sends."""
    _defaults()["max_time"] = max(0.0, seconds)


def _defaults() -> dict[str, Any]:
    defaults = pull_objects.__kwdefaults__
    assert defaults
    return defaults
