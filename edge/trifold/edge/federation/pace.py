"""Flower's pauses, shortened: together they would take longer than a round may cost beyond its work.

Flower 1.41 has no settings for these. All else about them stays as it is.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Final

from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, pull_objects
from flwr.supernode import start_client_internal

_LOOK: Final = 0.25
"""Seconds between looking for messages at the SuperLink (Flower: 3) and for ClientApps' answers (0.5)."""

_AGAIN: Final = 0.05
"""Seconds until a part of a message that is still on its way is asked for again (Flower: 1), then twice."""


def shorten() -> None:
    """For this process, from now on."""
    # The module's loop is all that uses its `time`, and for these pauses alone.
    vars(start_client_internal)["time"] = SimpleNamespace(sleep=_shortly)
    for pull in (pull_objects, pull_and_inflate_object_from_tree):
        defaults = pull.__kwdefaults__
        assert defaults
        defaults["initial_backoff"] = _AGAIN


def _shortly(seconds: float) -> None:
    time.sleep(min(seconds, _LOOK))
