"""What leaves a site in place of an answer: why there is none."""

from __future__ import annotations

import logging
import secrets
from typing import Final

from trifold.edge.federation.frames import Record
from trifold.shared.errors import ConfigError, DamagedFile, UnsupportedModel
from trifold.shared.session.status import public

_OWN: Final = (ConfigError, DamagedFile, UnsupportedModel)
"""Errors about files of the site's: they name paths."""

log = logging.getLogger(__name__)


def refusal(error: Exception) -> Record:
    """The record that tells the cloud of an error.

    Errors about the site's own files, and all that are not a TrifoldError, stay in the site's log, under a
    number that is told.
    """
    if isinstance(error, _OWN):
        number = secrets.token_hex(4)
        log.error("refusal %s: %s", number, error.message)
        return {"refusal": f"refusal {number} ({error.reason}): the log of the trainer has the details"}
    return {"refusal": public(error).message}
