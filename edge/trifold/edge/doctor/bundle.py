"""Are the files of the bundle those that were split?"""

from __future__ import annotations

from collections.abc import Iterator

from trifold.edge.doctor.check import Check
from trifold.edge.doctor.finding import Finding, fault, ok, skipped
from trifold.edge.doctor.patient import MIB, Patient
from trifold.edge.doctor.tiers import damage, own, size
from trifold.shared.bundle.adapter import ADAPTED
from trifold.shared.bundle.folder import REMEDY, TierFolder
from trifold.shared.bundle.store import AdapterStore
from trifold.shared.errors import TrifoldError


def examine(patient: Patient) -> Iterator[Finding]:
    if patient.bundle is None:
        yield skipped("no --bundle was given")
        return
    folders = own(patient.bundle)
    for folder in folders:
        wrong = damage(folder)
        told = f"{folder.tier}: {len(folder.files)} files, {size(folder) // MIB} MiB, as their digests say"
        yield fault(wrong) if wrong else ok(f"{told}; bundle {folder.manifest.serving_digest[:12]}")
    if len({folder.manifest.serving_digest for folder in folders}) > 1:
        yield fault(f"{patient.bundle}: the tiers here are from different bundles")
    if patient.core and "edge" not in (tiers := [folder.tier for folder in folders]):
        here = f"{patient.bundle}: here lies the part of the {' and the '.join(tiers)}"
        yield fault(
            f"{here}, and not the edge's, which `trifold edge serve` needs in front of a core",
            "copy the folder `edge` from where the bundle was made, and give it with --bundle",
        )
    for folder in folders:
        if folder.tier in ADAPTED:
            yield from _versions(folder)


def _versions(folder: TierFolder) -> Iterator[Finding]:
    """The adapter versions beside a shard. Raises DamagedFile for a list of promotions that is none."""
    store = AdapterStore(folder)
    broken = False
    for digest in store.digests():
        try:
            store.verify(digest)
        except TrifoldError as error:
            broken = True
            yield fault(error.message, f"remove {store.path / digest} and add the version again")
    current = store.current()
    if current not in store:
        yield fault(
            f"{folder.tier}: version {current[:12]} is in force, and not here",
            "add it with `trifold adapter add`, or go back with `trifold adapter rollback`",
        )
    elif not broken and (count := len(store.digests())):
        yield ok(f"{folder.tier}: {count} adapter versions whole; in force: {current[:12] or 'the base'}")


BUNDLE = Check("bundle", examine, REMEDY)
