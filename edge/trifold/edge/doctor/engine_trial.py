"""One of the core's engines at work: `python -m trifold.edge.doctor.engine_trial ENGINE THREADS FOLDER`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final

import numpy as np

from trifold.edge.doctor.trial import inputs_for, timed
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.errors import TrifoldError
from trifold.shared.runtime.shard import Shard

ENGINES: Final = "trifold.engines"
"""The group of entry points by which the cloud makes its engines known: functions from TierFolder to Core."""


@dataclass(frozen=True)
class EngineTrial:
    """An engine that has computed; `error` is its difference from the shard's rows, by their norm."""

    fingerprint: str
    exact: bool
    error: float
    seconds: float


def run_engine(name: str, folder: TierFolder, threads: int) -> EngineTrial:
    """Raises ConfigError where the engine is not set up here, or the bundle has not what it computes with."""
    [entry] = entry_points(group=ENGINES, name=name)
    shard = Shard(folder, threads=threads)
    rows = inputs_for(shard)
    wanted, _ = timed(shard, rows)
    del shard  # before the engine, as memory may be enough for one of them
    core: Any = entry.load()(folder)
    got, seconds = timed(core, rows)
    error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    return EngineTrial(core.fingerprint, core.exact, float(error), seconds)


def main() -> None:
    """Prints the trial as JSON; an error ends it with the message on stderr, and the error's exit code."""
    name, threads, path = sys.argv[1:]
    try:
        trial = run_engine(name, TierFolder.open(Path(path), "cloud"), int(threads))
    except TrifoldError as error:
        print(error.message, file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(asdict(trial)))


if __name__ == "__main__":
    main()
