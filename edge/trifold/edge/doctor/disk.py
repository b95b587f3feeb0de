"""Is there room on the disks that Trifold writes to, and can it write there?"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import disk_usage
from typing import Final

from trifold.edge.doctor.check import Check
from trifold.edge.doctor.finding import Finding, fault, ok, warning
from trifold.edge.doctor.patient import MIB, Patient
from trifold.edge.doctor.tiers import on_site, size
from trifold.shared.errors import TrifoldError

_TRIAL: Final = MIB
"""Bytes that are written for a trial: what a file system calls free may be root's alone, or over a quota."""

_LITTLE: Final = 256 * MIB

_REMEDIES: Final = {
    errno.ENOSPC: "the disk is full: delete what is not needed, or take a larger one",
    errno.EDQUOT: "the quota is used up: delete what is not needed, or have it raised",
    errno.EROFS: "it can only be read, as cards that wear out: look at `dmesg`, mount it anew or replace it",
}


def examine(patient: Patient) -> Iterator[Finding]:
    # Not tempfile.gettempdir(), which quietly takes another folder where this one is full.
    yield from _written(Path(os.environ.get("TMPDIR", "/tmp")), "temporary files")  # noqa: S108
    # The certificate's own check says where the folder is none.
    if patient.tls and patient.tls.is_dir():
        yield from _written(patient.tls, "renewed certificates")
    if patient.bundle:
        yield from _versions(patient.bundle)


def _written(folder: Path, purpose: str) -> Iterator[Finding]:
    """A file is written, as a service would, and removed."""
    where = f"{folder}, for {purpose}"
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".trifold-doctor-") as file:
            file.write(bytes(_TRIAL))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        told = f"{where}: {_TRIAL // MIB} MiB cannot be written: {error.strerror}"
        if error.errno in (errno.EACCES, errno.EPERM):
            yield warning(
                told, "run `trifold doctor` as the user of the service; if it is, give it the folder"
            )
        elif error.errno == errno.ENOENT:
            yield fault(told, "make the folder, or give the right one")
        else:
            yield fault(told, _REMEDIES.get(error.errno or 0, ""))
        return
    free = disk_usage(folder).free
    told = f"{where}: {free // MIB} MiB free"
    yield warning(f"{told}, which is little") if free < _LITTLE else ok(told)


def _versions(bundle: Path) -> Iterator[Finding]:
    """Every adapter version takes as much as the shard that it changes."""
    try:
        needed = sum(size(folder) for folder in on_site(bundle))
        free = disk_usage(bundle).free
    except (TrifoldError, OSError):
        # The bundle's own check says what is wrong with it.
        return
    told = f"{bundle}, for adapter versions of {needed // MIB} MiB: {free // MIB} MiB free"
    yield warning(f"{told}: not enough for one") if free < needed else ok(told)


DISK = Check(
    "disk", examine, "delete what is not needed: old adapter versions (BUNDLE/*/adapters), logs, containers"
)
