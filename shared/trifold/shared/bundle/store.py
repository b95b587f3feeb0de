"""AdapterStore: the adapter versions of one tier, and which of them new sessions get.

    <tier>/adapters/<digest>/   one version
    <tier>/adapters/current     digests as they were promoted, one a line, the one in force first

`current` is replaced whole, never edited, so whoever reads it gets a promotion or the one before.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from trifold.shared.bundle.adapter import ADAPTED, AdaptedFolder
from trifold.shared.bundle.folder import MANIFEST, TierFolder
from trifold.shared.errors import ConfigError, DamagedFile, DigestMismatch, InvalidRequest

ADAPTERS: Final = "adapters"
CURRENT: Final = "current"

BASE: Final = ""
"""The digest of the bundle's own weights, as on the wire."""

_BASE_LINE: Final = "base"
_DIGEST: Final = re.compile("[0-9a-f]{64}")


class AdapterStore:
    """The versions beside the files of `folder`."""

    def __init__(self, folder: TierFolder) -> None:
        self.folder = folder
        self.path = folder.path / ADAPTERS
        self._current = self.path / CURRENT

    def __iter__(self) -> Iterator[AdaptedFolder]:
        """All versions, oldest first. Raises DamagedFile naming a file."""
        names = [path.name for path in self.path.glob("*") if _DIGEST.fullmatch(path.name)]
        return iter(sorted(map(self.version, names), key=lambda version: version.adapter.origin.created))

    def __contains__(self, digest: str) -> bool:
        return digest == BASE or bool(_DIGEST.fullmatch(digest) and (self.path / digest).exists())

    def open(self, digest: str) -> TierFolder:
        """The files of a version. Raises DigestMismatch when it is not here, DamagedFile naming a file."""
        return self.folder if digest == BASE else self.version(digest)

    def current(self) -> str:
        """The version that new sessions get. Raises DamagedFile."""
        return next(iter(self.history()), BASE)

    def history(self) -> list[str]:
        """What was promoted and not rolled back, the latest first. Raises DamagedFile."""
        try:
            lines = self._current.read_text(encoding="ascii").splitlines()
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise DamagedFile(f"{self._current}: cannot be read: {error}") from error
        for line in lines:
            if line != _BASE_LINE and not _DIGEST.fullmatch(line):
                raise DamagedFile(f"{self._current}: {line[:80]!r} is no digest; remove the file and promote")
        return [BASE if line == _BASE_LINE else line for line in lines]

    def stamp(self) -> tuple[int, int] | None:
        """Something that changes with every promotion, and is cheap to look at."""
        try:
            status = self._current.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    def verify(self, digest: str) -> None:
        """Reads every file of a version. Raises DigestMismatch, or DamagedFile naming the file."""
        if digest != BASE:
            version = self.version(digest)
            for name in version.adapter.files:
                version.read(name)

    def promote(self, digest: str) -> None:
        """Gives new sessions this version; again where it is in force. Raises ConfigError."""
        before = self.history()
        self._write(before if before[:1] == [digest] else [digest, *before])

    def rollback(self) -> None:
        """Takes the latest promotion back. Raises ConfigError."""
        self._write(self.history()[1:])

    def version(self, digest: str) -> AdaptedFolder:
        """As open(), for what is not the bundle's own."""
        if digest not in self:
            what = f"the {self.folder.tier} has no adapter version {digest[:12]!r}"
            raise DigestMismatch(f"{what}: add it there, or go back to one that all tiers have")
        return AdaptedFolder(self.folder, self.path / digest)

    def _write(self, history: list[str]) -> None:
        lines = "".join(f"{digest or _BASE_LINE}\n" for digest in history)
        try:
            self.path.mkdir(exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=f".{CURRENT}.", dir=self.path)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(lines)
                file.flush()
                os.fchmod(descriptor, 0o644)
                os.fsync(descriptor)
            Path(name).replace(self._current)
        except OSError as error:
            raise ConfigError(f"{self._current}: cannot be written: {error.strerror}") from error


def stores(bundle: Path) -> list[AdapterStore]:
    """Those of edge and device, or of the one whose folder `bundle` is.

    Raises ConfigError for the cloud's folder, DamagedFile for what is no bundle.
    """
    tiers = [tier for tier in ADAPTED if (bundle / tier / MANIFEST).exists()]
    if tiers:
        return [AdapterStore(TierFolder.open(bundle, tier)) for tier in tiers]
    edge, device = ADAPTED
    try:
        return [AdapterStore(TierFolder.open(bundle, edge))]
    except ConfigError:
        return [AdapterStore(TierFolder.open(bundle, device))]


def find(bundle: Path, prefix: str) -> str:
    """The one version whose digest begins like this; `base` is the bundle's own weights.

    Raises InvalidRequest when there is none, or more than one.
    """
    if prefix == _BASE_LINE:
        return BASE
    found = {version.path.name for store in stores(bundle) for version in store}
    matching = [digest for digest in found if prefix and digest.startswith(prefix)]
    if len(matching) != 1:
        what = f"{len(matching)} versions of {bundle} begin with {prefix!r}"
        raise InvalidRequest(f"{what}: `trifold adapter list` shows them all")
    return matching[0]


def promote(bundle: Path, digest: str) -> None:
    """Gives new sessions this version in every tier here, after each has read all of its files.

    Raises DigestMismatch when a tier lacks it, DamagedFile naming the file; then nothing has changed.
    """
    here = stores(bundle)
    for store in here:
        store.verify(digest)
    for store in here:
        store.promote(digest)


def rollback(bundle: Path) -> str:
    """Takes the latest promotion back in every tier here, and returns the version that is in force then.

    Raises ConfigError when there is none, or the tiers would not agree, DamagedFile, DigestMismatch.
    """
    here = stores(bundle)
    histories = [store.history() for store in here]
    if not all(histories):
        raise ConfigError(f"{bundle}: no version has been promoted that could be taken back")
    before = {next(iter(history[1:]), BASE) for history in histories}
    if len(before) > 1:
        raise ConfigError(f"{bundle}: edge and device had different versions; promote one by its digest")
    for store in here:
        store.verify(*before)
    for store in here:
        store.rollback()
    return before.pop()
