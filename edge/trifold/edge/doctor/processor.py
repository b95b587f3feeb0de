"""What computes here, and by which instructions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

from trifold.edge.doctor.check import Check
from trifold.edge.doctor.finding import Finding, ok, warning
from trifold.edge.doctor.patient import Patient
from trifold.shared.runtime.fingerprint import instructions

_WANTED: Final = {"x86_64": ("avx2", "fma"), "aarch64": ("asimddp",)}
"""What ONNX Runtime's integer kernels are made for: without, it takes its slowest ones."""


def examine(_: Patient) -> Iterator[Finding]:
    machine, *flags = instructions().split("+")
    told = f"{machine}, {len(os.sched_getaffinity(0))} cores: {', '.join(flags) or 'no flags that count'}"
    missing = [flag for flag in _WANTED.get(machine, ()) if flag not in flags]
    if missing:
        yield warning(f"{told}; without {' and '.join(missing)}")
    else:
        yield ok(told)


PROCESSOR = Check(
    "processor",
    examine,
    "it serves, but slowly: give the edge fewer layers (`trifold plan`), or take a newer CPU",
)
