"""`python -m tests.leaking.observed [CLASS BYTES] -m MODULE ARGUMENT…`: as `python -m MODULE …`, observed.

At SIGUSR1 it collects its garbage and gives back what is free, so that what is left is in use. With CLASS
(module:name) a leak is planted: for every object of it so many bytes are kept for ever. An interpreter for
ServiceProcess.
"""

from __future__ import annotations

import ctypes
import gc
import runpy
import signal
import sys
from importlib import import_module
from typing import Any


def main() -> None:
    at = sys.argv.index("-m")
    signal.signal(signal.SIGUSR1, lambda *_: _tidy())
    if planted := sys.argv[1:at]:
        _plant(*planted)
    module, *arguments = sys.argv[at + 1 :]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _tidy() -> None:
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc
        trim(0)


def _plant(where: str, size: str) -> None:
    name, _, kind = where.partition(":")
    leaking: Any = getattr(import_module(name), kind)
    honest, kept = leaking.__init__, []

    def leak(self: Any, *arguments: Any, **named: Any) -> None:
        kept.append(bytes(int(size)))
        honest(self, *arguments, **named)

    leaking.__init__ = leak


if __name__ == "__main__":
    main()
