"""A Jetson's own software: Jetson Linux (L4T), JetPack, TensorRT, power."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from typing import Final

from trifold.edge.doctor.check import Check
from trifold.edge.doctor.finding import Finding, fault, ok, skipped, warning
from trifold.edge.doctor.packages import Package, packages
from trifold.edge.doctor.patient import Patient
from trifold.edge.doctor.power import examine_heat, examine_power

_RELEASE: Final = "etc/nv_tegra_release"
_MODEL: Final = "proc/device-tree/model"
_LINE: Final = re.compile(r"^# R(\d+) \(release\), REVISION: ([\d.]+)")

_JETPACKS: Final = {36: "6", 38: "7", 39: "7"}
"""JetPack by major release of L4T. Orins have had JetPack 7 since 39."""

_LIBRARY: Final = re.compile(r"libnvinfer\d+")

_CONFIGURE: Final = "sudo dpkg --configure -a && sudo apt-get install --fix-broken, then restart it"


def examine(patient: Patient) -> Iterator[Finding]:
    model, release = patient.text(_MODEL), patient.text(_RELEASE)
    line = _LINE.match(release)
    if not release and "Jetson" not in model:
        yield skipped(f"this is no Jetson: there is no /{_RELEASE}")
    elif not release:
        told = f"{model}, but there is no /{_RELEASE}"
        yield warning(told, f"in a container: mount it (-v /{_RELEASE}:/{_RELEASE}:ro)")
    elif not line:
        yield warning(f"/{_RELEASE} begins with {release.splitlines()[0][:60]!r}, which is no release of L4T")
    else:
        installed = packages(patient)
        yield _release(model or "a Jetson", int(line[1]), line[2], installed)
        yield from _halves(f"{line[1]}.{line[2]}", installed)
        yield _tensorrt(patient, installed)
        yield from examine_power(patient)
        yield from examine_heat(patient)


def _release(model: str, major: int, revision: str, installed: dict[str, Package]) -> Finding:
    jetpack = installed.get("nvidia-jetpack")
    told = f"{model}: L4T R{major}.{revision}"
    if major in _JETPACKS:
        return ok(f"{told}, JetPack {jetpack.version if jetpack else _JETPACKS[major]}")
    if major < min(_JETPACKS):
        return fault(f"{told} is too old", "flash JetPack 6 or 7 with NVIDIA's SDK Manager")
    return warning(f"{told} is newer than this Trifold knows", "look for a newer Trifold")


def _halves(release: str, installed: dict[str, Package]) -> Iterator[Finding]:
    """Packages that an upgrade has left half-way."""
    ours = [p for p in installed.values() if p.name.startswith("nvidia-l4t-") or _LIBRARY.fullmatch(p.name)]
    broken = [package.name for package in ours if not package.whole]
    if broken:
        yield fault(f"not fully installed: {', '.join(broken)}", _CONFIGURE)
    core = installed.get("nvidia-l4t-core")
    if core and core.version.partition("-")[0] != _three(release):
        told = f"nvidia-l4t-core is {core.version}, /{_RELEASE} says R{release}: an upgrade stopped half-way"
        yield warning(told, "sudo apt-get full-upgrade, then restart it")


def _three(release: str) -> str:
    """36.4 as the packages write it: 36.4.0."""
    parts = release.split(".")
    return ".".join([*parts, "0", "0"][: max(3, len(parts))])


def _tensorrt(patient: Patient, installed: dict[str, Package]) -> Finding:
    """Libraries and Python package: these come apart where the Python is not JetPack's own."""
    package = next((p for p in installed.values() if _LIBRARY.fullmatch(p.name)), None)
    files = (patient.root / "usr/lib/aarch64-linux-gnu").glob("libnvinfer.so.*.*.*")
    version = package.version if package else next((file.name[len("libnvinfer.so.") :] for file in files), "")
    if not version:
        return skipped("TensorRT is not installed; sudo apt-get install nvidia-jetpack brings it")
    python = "with" if importlib.util.find_spec("tensorrt") else "without"
    return ok(f"TensorRT {version}, {python} its package for this Python")


JETSON = Check("jetson", examine, "see NVIDIA's documentation of JetPack for this board")
