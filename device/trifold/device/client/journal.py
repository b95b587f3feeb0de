"""The journal of a generation: enough to go on after a crash of the device.

One JSON object a line: first the request, then epochs, fingerprints and tokens as they come. A token is
written before it is sent on or shown, so whatever anybody has seen of a generation is in its journal.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from io import FileIO
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, ValidationError

from trifold.shared.errors import DamagedFile, InvalidRequest
from trifold.shared.model.spec import Part
from trifold.shared.runtime.sampling import Sampling

_BEGINNING: Final = b'{"format":'


class Request(Part):
    """What is generated; with the bundle it determines every token.

    `session` is 16 random bytes in hex: whoever knows them may take the session over, so they are a secret.
    """

    format: Literal[1] = 1
    session: str = Field(pattern="^[0-9a-f]{32}$", default_factory=lambda: secrets.token_hex(16), repr=False)
    serving_digest: str
    adapter_digest: str = Field("", pattern="^([0-9a-f]{64})?$")
    prompt: tuple[int, ...] = Field(min_length=1)
    sampling: Sampling
    max_tokens: int = Field(ge=1)
    stop: tuple[str, ...]
    eos: tuple[int, ...]
    logprobs: int | None = Field(None, ge=0)

    @property
    def capacity(self) -> int:
        """Positions that prompt and new tokens may take."""
        return len(self.prompt) + self.max_tokens


class _Line(Part):
    """Any line but the first; one of the three is set."""

    epoch: int | None = Field(None, ge=1)
    fingerprints: dict[str, str] | None = None
    token: int | None = Field(None, ge=0)


class Journal:
    """Request, committed tokens, epoch and the fingerprints of the tiers; on disk if it has a path.

    While it is open nobody else can open it. The file is for its owner's eyes only, for it holds the session.
    Lines survive the end of the process, not a loss of power.
    """

    def __init__(self, request: Request, path: Path | None = None) -> None:
        """A new journal. Raises InvalidRequest when the file exists: it may hold another generation."""
        self.request = request
        self.ids = list(request.prompt)
        self.epoch = 0
        self.fingerprints: dict[str, str] = {}
        self._path = path
        self._file: FileIO | None = None
        if path is not None:
            self._file = _open_locked(path, os.O_CREAT | os.O_EXCL)
            self._write(request.model_dump(mode="json"))

    @classmethod
    def open(cls, path: Path) -> Self:
        """The journal of an earlier process.

        A damaged last line is dropped: its token had not been shown.
        Raises DamagedFile for what is no journal, or naming the line for any other damage, InvalidRequest
        when it is open elsewhere.
        """
        file = _open_locked(path, 0)
        try:
            data = path.read_bytes()
            if not data.startswith(_BEGINNING[: len(data)]):
                raise DamagedFile(f"{path} is not a journal of Trifold")
            whole, torn = _split(data)
            journal = cls(_request(path, whole))
            for number, line in enumerate(whole[1:], 2):
                journal._replay(_parse(path, number, line))
            if torn:
                file.truncate(sum(map(len, whole)))
                journal.epoch += 1  # the torn line may have been an epoch that a tier knows by now
        except BaseException:
            file.close()
            raise
        journal._path, journal._file = path, file
        return journal

    @property
    def tokens(self) -> list[int]:
        """The committed tokens."""
        return self.ids[len(self.request.prompt) :]

    def raise_epoch(self) -> int:
        """The epoch for the next Open."""
        self._write({"epoch": self.epoch + 1})
        self.epoch += 1
        return self.epoch

    def note_fingerprints(self, fingerprints: dict[str, str]) -> tuple[str, ...]:
        """Remembers what computes in each tier, and returns the tiers where that has changed."""
        changed = tuple(tier for tier, now in fingerprints.items() if self.fingerprints.get(tier, now) != now)
        if fingerprints != self.fingerprints:
            self._write({"fingerprints": fingerprints})
            self.fingerprints = fingerprints
        return changed

    def commit(self, token: int) -> None:
        self._write({"token": token})
        self.ids.append(token)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            return
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        try:
            written = self._file.write(data)
        except OSError as error:
            raise DamagedFile(f"the journal {self._path} cannot be written: {error.strerror}") from None
        if written < len(data):
            raise DamagedFile(f"the journal {self._path} cannot be written: the disk is full")

    def _replay(self, line: _Line) -> None:
        self.epoch = line.epoch or self.epoch
        self.fingerprints = line.fingerprints or self.fingerprints
        if line.token is not None:
            self.ids.append(line.token)


def _open_locked(path: Path, flags: int) -> FileIO:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | flags, 0o600)
    except FileExistsError:
        raise InvalidRequest(f"{path} exists: resume that generation or choose another journal") from None
    except OSError as error:
        raise DamagedFile(f"the journal {path} cannot be opened: {error.strerror}") from None
    file = FileIO(descriptor, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise InvalidRequest(f"the journal {path} is in use by another process") from None
    return file


def _split(data: bytes) -> tuple[list[bytes], bytes]:
    """The lines that are whole, and a last one that is not."""
    *lines, torn = data.split(b"\n")
    if lines and not torn and not _is_json(lines[-1]):
        torn = lines.pop()
    return [line + b"\n" for line in lines], torn


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _request(path: Path, lines: list[bytes]) -> Request:
    if not lines:
        raise DamagedFile(f"the journal {path} holds no request: the generation had not begun, start it anew")
    try:
        return Request.model_validate_json(lines[0])
    except (ValidationError, InvalidRequest):
        raise DamagedFile(f"{path} line 1 is not the request of a journal") from None


def _parse(path: Path, number: int, line: bytes) -> _Line:
    try:
        return _Line.model_validate_json(line)
    except ValidationError:
        raise DamagedFile(
            f"{path} line {number} is damaged; without it the journal cannot be resumed"
        ) from None
