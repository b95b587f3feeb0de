"""`python -m tests.bench.unbatched -m MODULE ARGUMENT…`: as `python -m MODULE …`, without batches in a core.

It computes one step after the other, whole, in turn, as it did before there were batches. An interpreter for
ServiceProcess.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from typing import Any

from trifold.cloud.core.scheduler import BatchScheduler, RowJob
from trifold.shared.session.scheduler import Job, Lines, TurnScheduler


def _one(scheduler: BatchScheduler, lines: Lines) -> Sequence[Job[Any]]:
    [job] = TurnScheduler.pick(scheduler, lines)
    if isinstance(job, RowJob):
        job.granted = job.rows
    return (job,)


def main() -> None:
    BatchScheduler.pick = _one  # type: ignore[assignment, method-assign]
    module, *arguments = sys.argv[sys.argv.index("-m") + 1 :]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
