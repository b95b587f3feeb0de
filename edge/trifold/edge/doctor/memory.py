"""Is there memory for the shards that lie here?"""

from __future__ import annotations

from collections.abc import Iterator

from trifold.edge.doctor.check import Check
from trifold.edge.doctor.finding import Finding, fault, ok, warning
from trifold.edge.doctor.patient import MIB, Patient
from trifold.edge.doctor.tiers import own, size
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.errors import TrifoldError


def examine(patient: Patient) -> Iterator[Finding]:
    have = available(patient)
    told = f"{have // MIB} MiB available"
    if patient.bundle is None:
        yield ok(told)
        return
    try:
        folders = own(patient.bundle)
    except TrifoldError:
        # The bundle's own check says what is wrong with it.
        yield ok(told)
        return
    for folder in folders:
        weights = size(folder)
        shard = f"the {folder.tier} shard has {weights // MIB} MiB"
        if weights > have:
            yield fault(f"{told}, {shard}")
        elif folder.tier == "edge" and weights + patient.kv_memory > have:
            caches = f"caches may take {patient.kv_memory // MIB} MiB"
            yield warning(f"{told}, {shard} and {caches}", "serve with a smaller --kv-memory")
        else:
            yield ok(f"{told}, {shard}")


def available(patient: Patient) -> int:
    """Bytes that may still be taken, by the kernel and by the limit of a container."""
    lines = (line.split() for line in patient.text("proc/meminfo").splitlines())
    kernel = next((int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"), 0)
    limit, used = (patient.text(f"sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    return min(kernel, max(0, int(limit) - int(used))) if limit.isdecimal() and used.isdecimal() else kernel


def fits(folder: TierFolder, patient: Patient) -> bool:
    """Whether a shard can be loaded now."""
    return size(folder) <= available(patient)


MEMORY = Check("memory", examine, "end other programs, or give this tier fewer layers (`trifold plan`)")
