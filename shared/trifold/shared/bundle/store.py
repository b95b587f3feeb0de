"""AdapterStore: the adapter versions of one tier, and which of them new sessions get.

    <tier>/adapters/<digest>/   one version
    <tier>/adapters/current     digests as they were promoted, one a line, the one in force first; after a `-`
                                those that were taken back, on which sessions may still have to be resumed

`current` is replaced whole, never edited, so whoever reads it gets a promotion or the one before.
"""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, Literal

from trifold.shared import durable
from trifold.shared.bundle.adapter import ADAPTED, AdaptedFolder
from trifold.shared.bundle.folder import MANIFEST, TierFolder
from trifold.shared.errors import ConfigError, DamagedFile, DigestMismatch, InvalidRequest

ADAPTERS: Final = "adapters"
CURRENT: Final = "current"

BASE: Final = ""
"""The digest of the bundle's own weights, as on the wire."""

_BASE_LINE: Final = "base"
_TAKEN_BACK: Final = "-"
_DIGEST: Final = re.compile("[0-9a-f]{64}")
_LINE: Final = re.compile(f"{_TAKEN_BACK}?({_BASE_LINE}|{_DIGEST.pattern})")


class AdapterStore:
    """The versions beside the files of `folder`."""

    def __init__(self, folder: TierFolder) -> None:
        self.folder = folder
        self.path = folder.path / ADAPTERS
        self._current = self.path / CURRENT

    def digests(self) -> list[str]:
        """The versions that lie here, damaged or not."""
        return sorted(path.name for path in self.path.glob("*") if _DIGEST.fullmatch(path.name))

    def __contains__(self, digest: str) -> bool:
        return digest == BASE or bool(_DIGEST.fullmatch(digest) and (self.path / digest).exists())

    def open(self, digest: str) -> TierFolder:
        """The files of a version. Raises DigestMismatch when it is not here, DamagedFile naming a file."""
        return self.folder if digest == BASE else self.version(digest)

    def version(self, digest: str) -> AdaptedFolder:
        """As open(), for what is not the bundle's own."""
        if digest not in self:
            what = f"the {self.folder.tier} has no adapter version {digest[:12]!r}"
            raise DigestMismatch(f"{what}: add it there, or go back to one that all tiers have")
        return AdaptedFolder(self.folder, self.path / digest)

    def verify(self, digest: str) -> None:
        """Reads every file of a version. Raises DigestMismatch, or DamagedFile naming the file."""
        if digest != BASE:
            version = self.version(digest)
            for name in version.adapter.files:
                version.read(name)

    def current(self) -> str:
        """The version that new sessions get. Raises DamagedFile."""
        return next(iter(self.history()), BASE)

    def history(self) -> list[str]:
        """What was promoted and not taken back, the latest first. Raises DamagedFile."""
        return [_digest(line) for line in self._lines() if not line.startswith(_TAKEN_BACK)]

    def promoted(self) -> set[str]:
        """Every version that was ever promoted: sessions may have begun on it. Raises DamagedFile."""
        return {_digest(line.removeprefix(_TAKEN_BACK)) for line in self._lines()}

    def stamp(self) -> tuple[int, int] | None:
        """Something that changes with every promotion, and is cheap to look at."""
        try:
            status = self._current.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    @contextmanager
    def locked(self, purpose: Literal["promoting", "building"]) -> Iterator[None]:
        """Waits until nobody else is at it. Raises ConfigError where the folder cannot be written."""
        path = self.path / f".{purpose}"
        try:
            self.path.mkdir(exist_ok=True)
            lock = path.open("a")
        except OSError as error:
            raise _unwritable(path, error) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def write(self, history: list[str]) -> None:
        """Makes this the history; for whoever holds the lock for promoting. Raises ConfigError."""
        taken_back = sorted(self.promoted() - {*history, BASE})
        lines = [digest or _BASE_LINE for digest in history] + [_TAKEN_BACK + digest for digest in taken_back]
        try:
            durable.write(self._current, "".join(f"{line}\n" for line in lines).encode())
        except OSError as error:
            raise _unwritable(self._current, error) from error

    def _lines(self) -> list[str]:
        try:
            lines = self._current.read_text(encoding="ascii").splitlines()
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise DamagedFile(f"{self._current}: cannot be read: {error}") from error
        for line in lines:
            if not _LINE.fullmatch(line):
                raise DamagedFile(f"{self._current}: {line[:80]!r} is no digest; remove the file and promote")
        return lines


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
    found = {digest for store in stores(bundle) for digest in store.digests()}
    matching = [digest for digest in found if prefix and digest.startswith(prefix)]
    if len(matching) != 1:
        many = f"{len(matching)} versions" if matching else "no version"
        what = f"{many} of {bundle} can be meant by {prefix!r}"
        raise InvalidRequest(f"{what}: `trifold adapter list` shows them all")
    return matching[0]


def promote(bundle: Path, digest: str) -> None:
    """Gives new sessions this version in every tier here, after each has read all of its files.

    Raises DigestMismatch when a tier lacks it, DamagedFile naming the file; then nothing has changed.
    Raises ConfigError naming the file that cannot be written: the edge may have the version then and the
    device not, until one is promoted again.
    """
    with _promoting(bundle) as here:
        for store in here:
            store.verify(digest)
        histories = [store.history() for store in here]
        for store, history in zip(here, histories, strict=True):
            store.write(history if history[:1] == [digest] else [digest, *history])


def rollback(bundle: Path) -> str:
    """Takes the latest promotion back in every tier here, and returns the version that is in force then.

    Raises ConfigError when there is none, the tiers do not agree now or would not then, or a file cannot be
    written, DamagedFile, DigestMismatch.
    """
    with _promoting(bundle) as here:
        _agree(bundle, "has", [store.current() for store in here], here)
        histories = [store.history() for store in here]
        if not all(histories):
            raise ConfigError(f"{bundle}: no version has been promoted that could be taken back")
        before = [next(iter(history[1:]), BASE) for history in histories]
        _agree(bundle, "had", before, here)
        for store in here:
            store.verify(before[0])
        for store, history in zip(here, histories, strict=True):
            store.write(history[1:])
    return before[0]


@contextmanager
def _promoting(bundle: Path) -> Iterator[list[AdapterStore]]:
    """The stores of a bundle, for as long as nobody else changes what is in force there."""
    here = stores(bundle)
    with ExitStack() as stack:
        for store in here:
            stack.enter_context(store.locked("promoting"))
        yield here


def _agree(bundle: Path, has: str, versions: list[str], here: list[AdapterStore]) -> None:
    """Raises ConfigError telling what each tier has unless that is the same."""
    if len(set(versions)) > 1:
        each = zip(here, versions, strict=True)
        told = [f"the {store.folder.tier} {has} {digest[:12] or _BASE_LINE}" for store, digest in each]
        raise ConfigError(f"{bundle}: {', '.join(told)}: promote one of them by its digest")


def _digest(line: str) -> str:
    return BASE if line == _BASE_LINE else line


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path}: cannot be written: {error.strerror or error}")
