"""Are the packages here those that Trifold was made for?"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distributions, requires, version

import trifold.shared.runtime.untold  # noqa: F401  # isort: skip - before onnxruntime

import onnxruntime as ort
from packaging.requirements import Requirement

from trifold.edge.doctor.check import Check
from trifold.edge.doctor.finding import Finding, fault, ok, warning
from trifold.edge.doctor.patient import Patient


def examine(_: Patient) -> Iterator[Finding]:
    told = ", ".join(f"{name} {_installed(name)}" for name in ("trifold", "onnxruntime", "grpcio", "numpy"))
    yield ok(f"Python {platform.python_version()}, {told}; {' '.join(platform.libc_ver())}".rstrip("; "))
    for wanted in _required():
        found = _installed(wanted.name)
        if not found:
            yield fault(f"{wanted.name} is not installed", f"pip install '{wanted}'")
        elif not wanted.specifier.contains(found, prereleases=True):
            yield fault(
                f"{wanted.name} is {found}, Trifold needs {wanted.specifier}", f"pip install '{wanted}'"
            )
    engines = _engines()
    if len(engines) > 1:
        told = f"{' and '.join(engines)} are both here, and one hides the providers of the other"
        yield warning(told, f"pip uninstall {' '.join(engines)}, then install one of them again")


def _required() -> list[Requirement]:
    """What every tier needs; extras are asked for where they are used."""
    wanted = [Requirement(line) for line in requires("trifold") or ()]
    return [line for line in wanted if not line.marker or line.marker.evaluate({"extra": ""})]


def _engines() -> list[str]:
    """The packages that bring the module onnxruntime."""
    named = (package for package in distributions() if package.name.startswith("onnxruntime"))
    return sorted({p.name for p in named if "onnxruntime" in (p.read_text("top_level.txt") or "").split()})


def _installed(package: str) -> str:
    """The version that is here; empty for none. onnxruntime has several names, and is asked itself."""
    if package == "onnxruntime":
        return str(ort.__version__)
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


VERSIONS = Check("versions", examine, "install Trifold again, in an environment of its own")
