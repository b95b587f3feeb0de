"""The packages of the machine itself, from dpkg's own list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from trifold.edge.doctor.patient import Patient

_STATUS: Final = "var/lib/dpkg/status"
_WHOLE: Final = "install ok installed"
_GONE: Final = ("not-installed", "config-files")


@dataclass(frozen=True)
class Package:
    """`whole`: it is unpacked and configured."""

    name: str
    version: str
    whole: bool


def packages(patient: Patient) -> dict[str, Package]:
    """By name; those that were removed are not here."""
    found = {}
    for paragraph in patient.text(_STATUS).split("\n\n"):
        pairs = (line.partition(": ") for line in paragraph.splitlines() if not line.startswith(" "))
        fields = {name: value for name, _, value in pairs}
        status = fields.get("Status", "")
        if status and not status.endswith(_GONE):
            package = Package(fields.get("Package", ""), fields.get("Version", ""), status.endswith(_WHOLE))
            found[package.name] = package
    return found
