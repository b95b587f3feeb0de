"""The tiers whose folders lie here: all of a bundle, or the one part that was copied to this machine."""

from __future__ import annotations

from pathlib import Path

from trifold.edge.doctor.patient import Patient
from trifold.shared.bundle.folder import MANIFEST, TierFolder
from trifold.shared.bundle.manifest import TIERS, Tier
from trifold.shared.errors import ConfigError, DamagedFile, TrifoldError


def own(bundle: Path) -> list[TierFolder]:
    """Raises DamagedFile for what is no bundle, or not whole."""
    here = [tier for tier in TIERS if (bundle / tier / MANIFEST).exists()]
    return [TierFolder.open(bundle, tier) for tier in here or [_part(bundle)]]


def on_site(bundle: Path) -> list[TierFolder]:
    """Those that a site runs; the cloud's only where nothing else is."""
    folders = own(bundle)
    return [folder for folder in folders if folder.tier != "cloud"] or folders


def whole(patient: Patient) -> list[TierFolder]:
    """Those of on_site() whose every file has the bytes that it should have."""
    try:
        folders = on_site(patient.bundle) if patient.bundle else []
    except TrifoldError:
        # The bundle's own check says what is wrong with it.
        return []
    return [folder for folder in folders if not damage(folder)]


def damage(folder: TierFolder) -> str:
    """What is wrong with the first file of a tier that is not as the manifest says; empty where all are."""
    try:
        for name in folder.files:
            folder.read(name)
    except DamagedFile as error:
        return error.message
    return ""


def size(folder: TierFolder) -> int:
    """Bytes of a tier's files, which are about those that its shard takes in memory."""
    return sum(entry.size for entry in folder.files.values())


def _part(folder: Path) -> Tier:
    """Whose folder it is: by its name, or by what lies in it."""
    named = [tier for tier in TIERS if tier == folder.resolve().name]
    for tier in named or ("edge", "device", "cloud"):
        try:
            return TierFolder.open(folder, tier).tier
        except ConfigError:
            continue
    return "edge"
