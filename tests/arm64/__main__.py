"""`make test-arm64`: brings an emulated arm64 machine here, and runs the tests on it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from subprocess import CalledProcessError
from time import perf_counter

import pytest

from tests.arm64.machine import BUILD, MACHINES, build_wheel
from tests.debian import NotDebian


def main(arguments: list[str]) -> int:
    began = perf_counter()
    try:
        wheel = build_wheel()
        for machine in MACHINES:
            print(f"{machine} in {BUILD} …", flush=True)
            machine.prepare(wheel)
            machine.core.prepare(wheel)
    except NotDebian as problem:
        print(f"make test-arm64: {problem}", file=sys.stderr)
        return 1
    except CalledProcessError as problem:
        print(f"make test-arm64: `{problem.cmd}` failed:\n{problem.stderr}", file=sys.stderr)
        return 1
    prepared = perf_counter()
    os.environ["TRIFOLD_TEST_ARM64"] = "1"
    code = pytest.main([str(Path(__file__).parent), "-s", "-v", *arguments])
    ended = perf_counter()
    took = f"set up in {prepared - began:.0f} s, tested in {ended - prepared:.0f} s"
    print(f"make test-arm64: {took}, {ended - began:.0f} s in all")
    return code


sys.exit(main(sys.argv[1:]))
