"""A process of its own for what may end the one that tries it: a library that does not fit, say."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from trifold.shared.errors import ConfigError

_PATIENCE: Final = 600.0
"""Seconds for one trial: TensorRT builds its engines first, which takes minutes."""

_MISSING: Final = re.compile(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object file")


class TrialFailed(Exception):
    """Why a trial gave nothing, in one line."""


def tried(module: str, *arguments: str, config: Path | None = None) -> Any:
    """What `python -m module` prints last, which is JSON.

    `config` is the TOML file that its settings come from, too. Raises ConfigError where it ended with one, as
    what is to be tried is not set up here. Else TrialFailed.
    """
    command = [sys.executable, "-m", module, *arguments]
    environment = os.environ | ({"TRIFOLD_CONFIG": str(config.resolve())} if config else {})
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        raise TrialFailed(f"no result within {_PATIENCE:g} s") from None
    except OSError as error:
        raise TrialFailed(f"no process could be started to try it: {error}") from None
    if done.returncode == ConfigError.exit_code:
        raise ConfigError(_last_line(done.stderr))
    if done.returncode:
        raise TrialFailed(_reason(done))
    try:
        return json.loads(_last_line(done.stdout))
    except ValueError:
        raise TrialFailed(f"what it printed makes no sense: {_last_line(done.stdout)}") from None


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if missing := _MISSING.search(done.stderr):
        return f"it does not come up: {missing[1]} is missing"
    if done.returncode < 0:
        return f"it ended the process that tried it ({signal.Signals(-done.returncode).name})"
    return _last_line(done.stderr)


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "it does not come up")
