"""The power mode of a Jetson and its heat, from the files that nvpmodel and the kernel keep."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from trifold.edge.doctor.finding import Finding, ok, skipped, warning
from trifold.edge.doctor.patient import Patient

_MODE: Final = re.compile(r"^\s*<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", re.MULTILINE)
_DEFAULT: Final = re.compile(r"^\s*<\s*PM_CONFIG\s+DEFAULT=(\d+)\s*>", re.MULTILINE)
_NOW: Final = re.compile(r"pmode:(\d+)")

_FASTEST: Final = ("MAXN_SUPER", "MAXN")
"""By name: the ids are in another order on every board."""

_HOT: Final = 90_000
"""Thousandths of a degree Celsius: Jetsons lower their clocks a little above this."""


def examine_power(patient: Patient) -> Iterator[Finding]:
    """The mode in force, and whether there is a faster one."""
    config = patient.text("etc/nvpmodel.conf")
    modes = {int(number): name for number, name in _MODE.findall(config)}
    # nvpmodel writes down what was last chosen; before that the board runs in the default of its list.
    current = _NOW.search(patient.text("var/lib/nvpmodel/status")) or _DEFAULT.search(config)
    if not current or not modes:
        yield skipped("power mode: nvpmodel is not here; in a container the machine itself knows")
        return
    number = int(current[1])
    told = f"power mode {modes.get(number, 'unknown')} ({number})"
    fastest = next((name for name in _FASTEST if name in modes.values()), None)
    if fastest is None or modes.get(number) == fastest:
        yield ok(told)
        return
    best = next(mode for mode, name in modes.items() if name == fastest)
    yield warning(f"{told} caps the clocks", f"for all of its speed: sudo nvpmodel -m {best} ({fastest})")


def examine_heat(patient: Patient) -> Iterator[Finding]:
    """The hottest zone, as tegrastats has it."""
    zones = sorted((patient.root / "sys/class/thermal").glob("thermal_zone*"))
    heat = {
        patient.text(f"{zone.relative_to(patient.root)}/type"): int(degrees)
        for zone in zones
        if (degrees := patient.text(f"{zone.relative_to(patient.root)}/temp")).isdecimal()
    }
    if not heat:
        return
    zone, hottest = max(heat.items(), key=lambda item: item[1])
    told = f"{zone} is at {hottest / 1000:.0f} °C"
    hot = warning(f"{told}: the clocks go down", "clean the fan, give it air, or choose a lower power mode")
    yield hot if hottest >= _HOT else ok(told)
