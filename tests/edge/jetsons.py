"""The files by which a Jetson tells what it is, as they lie on boards with L4T R36, R38 and R39."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

RELEASE = """\
# R{major} (release), REVISION: {revision}, GCID: {gcid}, BOARD: generic, EABI: aarch64, DATE: {date}
# KERNEL_VARIANT: oot
TARGET_USERSPACE_LIB_DIR=nvidia
TARGET_USERSPACE_LIB_DIR_PATH=usr/lib/aarch64-linux-gnu/nvidia
"""

ORIN_NANO_MODES = """\
# Mode list of an Orin Nano with its faster modes.
< PARAM TYPE=FILE NAME=CPU_ONLINE >
CORE_0 /sys/devices/system/cpu/cpu0/online

< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
GPU MAX_FREQ 612000000
< POWER_MODEL ID=1 NAME=25W >
CPU_ONLINE CORE_0 1
GPU MAX_FREQ 918000000
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
CPU_ONLINE CORE_0 1
GPU MAX_FREQ -1
< POWER_MODEL ID=3 NAME=7W >
CPU_ONLINE CORE_0 1

< PM_CONFIG DEFAULT=1 >
"""

THOR_MODES = """\
< POWER_MODEL ID=0 NAME=MAXN >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=120W >
CPU_ONLINE CORE_0 1

< PM_CONFIG DEFAULT=1 >
"""

PARAGRAPH = """\
Package: {name}
Status: {status}
Priority: standard
Section: metapackages
Installed-Size: 1024
Maintainer: NVIDIA Corporation
Architecture: arm64
Version: {version}
Description: {name} of a Jetson
 Its long description goes on in lines like this one.
 Version: of nothing
"""


@dataclass(frozen=True)
class Board:
    model: str
    major: int
    revision: str
    gcid: str
    date: str
    packages: dict[str, str]
    modes: str
    mode: int | None
    """The mode that was chosen with nvpmodel, if any was."""

    def under(self, root: Path, *, halves: Iterable[str] = (), **versions: str) -> Path:
        """Writes its files below `root`; `halves` are packages that are not configured."""
        put(root / "proc/device-tree/model", f"{self.model}\0")
        put(
            root / "etc/nv_tegra_release",
            RELEASE.format(major=self.major, revision=self.revision, gcid=self.gcid, date=self.date),
        )
        installed = self.packages | {name.replace("_", "-"): version for name, version in versions.items()}
        states = dict.fromkeys(installed, "install ok installed")
        states |= dict.fromkeys(halves, "install ok half-configured")
        paragraphs = [
            PARAGRAPH.format(name=name, status=states[name], version=version)
            for name, version in installed.items()
        ]
        gone = PARAGRAPH.format(name="nvidia-l4t-gone", status="deinstall ok config-files", version="35.1")
        put(root / "var/lib/dpkg/status", "\n".join([*paragraphs, gone]))
        put(root / "etc/nvpmodel.conf", self.modes)
        if self.mode is not None:
            put(root / "var/lib/nvpmodel/status", f"pmode:{self.mode:04d}")
        for number, (zone, degrees) in enumerate((("cpu-thermal", 48_500), ("tj-thermal", 53_906))):
            put(root / f"sys/class/thermal/thermal_zone{number}/type", f"{zone}\n")
            put(root / f"sys/class/thermal/thermal_zone{number}/temp", f"{degrees}\n")
        return root


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


ORIN_NANO = Board(
    model="NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
    major=36,
    revision="4.7",
    gcid="42132812",
    date="Thu Sep 18 22:54:44 UTC 2025",
    packages={
        "nvidia-l4t-core": "36.4.7-20250918154033",
        "nvidia-l4t-multimedia": "36.4.7-20250918154033",
        "nvidia-jetpack": "6.2.1+b38",
        "libnvinfer10": "10.3.0.30-1+cuda12.5",
    },
    modes=ORIN_NANO_MODES,
    mode=2,
)

THOR = Board(
    model="NVIDIA Jetson AGX Thor Developer Kit",
    major=38,
    revision="2.0",
    gcid="41844464",
    date="Fri Aug 22 00:55:42 UTC 2025",
    packages={"nvidia-l4t-core": "38.2.0-20250821174705", "libnvinfer10": "10.13.3.9-1+cuda13.0"},
    modes=THOR_MODES,
    mode=None,
)

ORIN_NX = Board(
    model="NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
    major=39,
    revision="2.1",
    gcid="45000000",
    date="Thu Aug  6 22:41:57 UTC 2026",
    packages={"nvidia-l4t-core": "39.2.1-20260806224157", "nvidia-jetpack": "7.2.1-b49"},
    modes=ORIN_NANO_MODES,
    mode=2,
)

XAVIER = Board(
    model="NVIDIA Jetson Xavier NX Developer Kit",
    major=35,
    revision="4.1",
    gcid="33958178",
    date="Tue Aug  1 19:57:35 UTC 2023",
    packages={"nvidia-l4t-core": "35.4.1-20230801124926"},
    modes="",
    mode=None,
)
