"""A process of its own for what may end the one that tries it: a library that does not fit, say."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from typing import Any, Final

from trifold.shared.errors import ConfigError

PATIENCE: Final = 600.0
"""Seconds for one trial: TensorRT builds its engines first, which takes minutes."""

_MISSING: Final = re.compile(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object file")


class TrialFailed(Exception):
    """Why a trial gave nothing, in one line."""


def tried(module: str, *arguments: str) -> Any:
    """What `python -m module` prints as JSON.

    Raises ConfigError where it ended with one: what is to be tried is not set up here. Else TrialFailed.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise TrialFailed(f"no result within {PATIENCE:g} s") from None
    if done.returncode == ConfigError.exit_code:
        raise ConfigError(_last_line(done.stderr))
    if done.returncode:
        raise TrialFailed(_reason(done))
    return json.loads(done.stdout)


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if missing := _MISSING.search(done.stderr):
        return f"it does not come up: {missing[1]} is missing"
    if done.returncode < 0:
        return f"it ended the process that tried it ({signal.Signals(-done.returncode).name})"
    return _last_line(done.stderr)


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "it does not come up")
