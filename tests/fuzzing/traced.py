"""`python -m tests.fuzzing.traced FOLDER -m MODULE ARGUMENT…`: as `python -m MODULE …`, and Reach is told.

FOLDER is one that Reach.make() has made. An interpreter for ServiceProcess.
"""

from __future__ import annotations

import runpy
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from tests.fuzzing.reach import Reach

if TYPE_CHECKING:
    from _typeshed import TraceFunction

_PRIME: Final = 40_503
_LAST: Final = (1 << 16) - 1


def main() -> None:
    _, folder, _, module, *arguments = sys.argv
    trace = _tracer(Reach(Path(folder)))
    threading.settrace(trace)
    sys.settrace(trace)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _tracer(reach: Reach) -> TraceFunction:
    offsets, memory, arcs = reach.offsets, reach.memory, reach.arcs

    def call(frame: FrameType, event: str, argument: Any) -> TraceFunction | None:
        offset = offsets.get(frame.f_code.co_filename)
        if offset is None:
            return None
        before = 0

        def line(frame: FrameType, event: str, argument: Any) -> TraceFunction:
            nonlocal before
            if event == "line":
                here = offset + frame.f_lineno
                memory[here] = 1
                memory[arcs + (before * _PRIME + here & _LAST)] = 1
                before = here
            return line

        return line

    return call


if __name__ == "__main__":
    main()
