"""API keys: a TOML file of their hashes, read again whenever it changes."""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from trifold.shared.errors import ConfigError, InvalidRequest, Unauthenticated

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """Who calls, and what they may use in a minute; 0 is no limit."""

    name: str
    requests_per_minute: int
    tokens_per_minute: int


class Entry(BaseModel):
    """What the file has of a key; without limits of its own those of the service hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    requests_per_minute: int | None = Field(None, ge=0)
    tokens_per_minute: int | None = Field(None, ge=0)


class ApiKeys:
    """Knows callers by their keys; without a file every caller is the same one."""

    def __init__(
        self, path: Path | None, *, requests_per_minute: int = 0, tokens_per_minute: int = 0
    ) -> None:
        """Raises ConfigError when the file cannot be used."""
        self._path = path
        self._anybody = Caller("", requests_per_minute, tokens_per_minute)
        self._callers: dict[str, Caller] = {}
        self._read_at = (0, 0)
        if path is not None:
            self._read(path)

    def caller(self, authorization: str | None) -> Caller:
        """Whose key `Bearer KEY` is. Raises Unauthenticated."""
        if self._path is None:
            return self._anybody
        self._follow(self._path)
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthenticated("an API key is needed: send the header `Authorization: Bearer KEY`")
        try:
            return self._callers[_hash(key.strip())]
        except KeyError:
            raise Unauthenticated("this API key is not known here") from None

    def node(self, identity: str) -> Caller:
        """Who calls with a certificate: that is known to be a node's, and needs no key."""
        return replace(self._anybody, name=identity)

    def _follow(self, path: Path) -> None:
        """What cannot be read leaves the keys as they are: nobody is locked out by a slip of the pen."""
        try:
            if _stamp(path) != self._read_at:
                self._read(path)
        except ConfigError as error:
            log.error("the keys stay as they were: %s", error.message)

    def _read(self, path: Path) -> None:
        self._read_at = _stamp(path)
        self._callers = {
            entry.sha256: Caller(
                name,
                _either(entry.requests_per_minute, self._anybody.requests_per_minute),
                _either(entry.tokens_per_minute, self._anybody.tokens_per_minute),
            )
            for name, entry in _entries(path).items()
        }


def add_key(path: Path, name: str) -> str:
    """Makes a key, puts its hash under `name` into the file, and returns it: it is written down nowhere else.

    Raises InvalidRequest for a name that is taken or is none, ConfigError for a file that cannot be used.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise InvalidRequest(f"{name!r} cannot be the name of a key: use letters, digits, - and _")
    if path.exists() and name in _entries(path):
        raise InvalidRequest(f"{path} has a key {name}: delete its lines to make another")
    key = "tf-" + secrets.token_urlsafe(32)
    try:
        path.touch(mode=0o600)
        with path.open("a", encoding="utf-8") as file:
            file.write(f'[{name}]\nsha256 = "{_hash(key)}"\n')
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    return key


def _hash(key: str) -> str:
    """A key has 256 random bits: a hash that is slow would add nothing."""
    return hashlib.sha256(key.encode()).hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"the keys {path} cannot be read: {error.strerror}") from None
    return status.st_mtime_ns, status.st_size


def _entries(path: Path) -> dict[str, Entry]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        return TypeAdapter(dict[str, Entry]).validate_python(content)
    except OSError as error:
        raise ConfigError(f"the keys {path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise ConfigError(f"the keys {path}: {where}: {error.errors()[0]['msg']}") from None
    except ValueError as error:
        raise ConfigError(f"the keys {path} are not TOML: {error}") from None


def _either(own: int | None, default: int) -> int:
    return default if own is None else own
