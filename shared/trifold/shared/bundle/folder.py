"""TierFolder: the files of one tier, each checked against the manifest on the way into memory."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, ClassVar, Final

from pydantic import ValidationError

from trifold.shared.bundle.manifest import TIERS, FileEntry, Manifest, Tier
from trifold.shared.errors import ConfigError, DamagedFile

MANIFEST: Final = "manifest.json"

Progress = Callable[[int, int], None]
"""Hears how much is done, and of how much."""

_PIECE: Final = 16 * 2**20
"""Bytes from one report to the next."""

_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
REMEDY: Final = "copy the folder again from where the bundle was made, or split again"


class TierFolder:
    """A tier's folder whose manifest is sound and whose files are there in the right size.

    `read` and `mapped` are the only ways to a file's bytes, and give none that do not have the hash of the
    manifest. The files for training may be missing: nobody else needs them.
    """

    _listing: ClassVar[str] = MANIFEST
    _remedy: ClassVar[str] = REMEDY

    def __init__(self, path: Path, tier: Tier, manifest: Manifest) -> None:
        self.path = path
        self.tier: Tier = tier
        self.manifest = manifest
        self.files = manifest.serving.files[tier]
        self._listed = manifest.training.get(tier, {}) | self.files

    @classmethod
    def open(cls, path: Path, tier: Tier) -> TierFolder:
        """Open `path`, the root of a bundle or the folder of this tier.

        Raises DamagedFile naming the file that is missing, linked, of a wrong size or not what it should be,
        and ConfigError when this is another tier's folder.
        """
        own = path / tier if (path / tier / MANIFEST).exists() else path
        manifest = _manifest(own / MANIFEST)
        if tier not in manifest.serving.files:
            raise DamagedFile(f"{own / MANIFEST}: lists no files for the tier {tier}")
        folder = cls(own, tier, manifest)
        try:
            folder._check()
        except DamagedFile:
            if other := folder._holder():
                raise ConfigError(
                    f"{own}: this is the {other}'s part; the {tier} needs the folder {tier} of the bundle"
                ) from None
            raise
        return folder

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def read(self, name: str) -> bytes:
        """The bytes of a file of this tier. Raises DamagedFile when they are not those of the manifest."""
        entry = self._entry(name)
        with os.fdopen(self._open(name, entry), "rb") as file:
            data = file.read(entry.size)
        self._compare(name, entry, hashlib.sha256(data))
        return data

    @contextmanager
    def mapped(self, name: str, progress: Progress = lambda done, total: None) -> Iterator[memoryview]:
        """As read(), for a file that is large: its bytes stay where the system keeps those of files.

        `progress` hears how many of them have been checked. Raises DamagedFile on leaving, too, when anything
        of the file was changed since: what has been made of it is not to be used then. One that is cut short
        meanwhile ends the process (SIGBUS), as it does for every mapped file.
        """
        entry = self._entry(name)
        if not entry.size:
            raise DamagedFile(f"{self.path / name}: is empty; {self._remedy}")
        with os.fdopen(self._open(name, entry), "rb") as file:
            before = _changed(file)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
                found = hashlib.sha256()
                for start in range(0, entry.size, _PIECE):
                    found.update(view[start : start + _PIECE])
                    progress(min(start + _PIECE, entry.size), entry.size)
                self._compare(name, entry, found)
                yield view
            if _changed(file) != before:
                raise DamagedFile(f"{self.path / name}: was changed while it was loaded; {self._remedy}")

    def _entry(self, name: str) -> FileEntry:
        if name not in self._listed:
            raise DamagedFile(f"{self.path / name}: is not listed in {self._listing}; {self._remedy}")
        return self._listed[name]

    def _compare(self, name: str, entry: FileEntry, found: hashlib._Hash) -> None:
        if found.hexdigest() != entry.sha256:
            what = f"the contents are not those of {self._listing}"
            raise DamagedFile(f"{self.path / name}: {what}; {self._remedy}")

    def _check(self) -> None:
        """Raises DamagedFile naming the file that is missing, linked, or of a wrong size."""
        for name, entry in self.files.items():
            os.close(self._open(name, entry))

    def _holder(self) -> Tier | None:
        """The tier whose files lie here, by their sizes."""
        for tier in TIERS:
            if tier in self.manifest.serving.files:
                with suppress(DamagedFile):
                    TierFolder(self.path, tier, self.manifest)._check()
                    return tier
        return None

    def _open(self, name: str, entry: FileEntry) -> int:
        """A descriptor of a regular file of the right size, right here: no link leads elsewhere."""
        path = self.path / name
        if not _PLAIN_NAME.fullmatch(name):
            raise DamagedFile(
                f"{self.path / self._listing}: {name!r} is not the name of a file in the same folder"
            )
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            reason = "is a symbolic link" if path.is_symlink() else f"cannot be read: {error.strerror}"
            raise DamagedFile(f"{path}: {reason}; {self._remedy}") from error
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and found.st_size == entry.size:
            return descriptor
        os.close(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise DamagedFile(f"{path}: is not a file; {self._remedy}")
        raise DamagedFile(f"{path}: has {found.st_size} bytes instead of {entry.size}; {self._remedy}")


def _changed(file: BinaryIO) -> tuple[int, int]:
    """When anything of a file was changed last: its contents, and what is known of it."""
    found = os.fstat(file.fileno())
    return found.st_mtime_ns, found.st_ctime_ns


def _manifest(path: Path) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DamagedFile(f"{path}: cannot be read: {error.strerror}; is this a bundle?") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DamagedFile(f"{path}: {where or 'the file'}: {first['msg']}; {REMEDY}") from error
    if manifest.serving.digest() != manifest.serving_digest:
        raise DamagedFile(f"{path}: the serving digest is not that of the contents; {REMEDY}")
    return manifest
