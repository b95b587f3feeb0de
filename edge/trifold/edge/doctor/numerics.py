"""Does this machine give the same bits however a prompt is cut? The self-test that services begin with."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter

from trifold.edge.doctor.check import Check
from trifold.edge.doctor.finding import Finding, fault, ok, skipped
from trifold.edge.doctor.memory import fits
from trifold.edge.doctor.patient import Patient
from trifold.edge.doctor.tiers import whole
from trifold.shared.bundle.adapter import ADAPTED
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.store import AdapterStore
from trifold.shared.errors import TrifoldError
from trifold.shared.runtime.shard import Shard


def examine(patient: Patient) -> Iterator[Finding]:
    if patient.bundle is None:
        yield skipped("no --bundle was given")
        return
    folders = whole(patient)
    if not folders:
        yield skipped("the bundle is not whole")
    for folder in folders:
        if fits(folder, patient):
            yield _proved(folder, patient.threads)
        else:
            yield skipped(f"the {folder.tier} shard does not fit the memory")


def _proved(folder: TierFolder, threads: int) -> Finding:
    """Of the version in force. Raises DamagedFile or DigestMismatch where that is not here."""
    if folder.tier in ADAPTED:
        store = AdapterStore(folder)
        folder = store.open(store.current())
    began = perf_counter()
    try:
        shard = Shard.load(folder, threads=threads)
    except TrifoldError as error:
        return fault(error.message, "is onnxruntime the version that it should be (`versions`, above)?")
    told = f"the {shard.tier} shard, loaded and tested in {perf_counter() - began:.1f} s: {shard.fingerprint}"
    return ok(f"{told}: exact") if shard.exact else fault(f"{told}: NOT exact")


NUMERICS = Check(
    "numerics",
    examine,
    "take other hardware; or serve with --inexact: then tokens may depend on how a prompt is cut",
)
