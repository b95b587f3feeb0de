"""What an authority remembers: tokens that were given out, and certificates that were signed."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from trifold.shared.errors import ConfigError, Forbidden
from trifold.shared.identity.name import Identity

_TABLES: Final = """
CREATE TABLE IF NOT EXISTS nodes (
    name TEXT PRIMARY KEY, role TEXT NOT NULL, tenants TEXT NOT NULL, hosts TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS tokens (
    hash TEXT PRIMARY KEY, node TEXT NOT NULL REFERENCES nodes (name), ends REAL NOT NULL);
CREATE TABLE IF NOT EXISTS certificates (
    serial TEXT PRIMARY KEY, node TEXT NOT NULL REFERENCES nodes (name), ends REAL NOT NULL, revoked REAL);
CREATE TABLE IF NOT EXISTS lists (number INTEGER PRIMARY KEY);
"""


@dataclass(frozen=True)
class Entry:
    """A node, as the authority lets it be called, and the hosts it is reached at."""

    identity: Identity
    hosts: tuple[str, ...]


@dataclass(frozen=True)
class Standing:
    """A node and its latest certificate: `ends` is None before the first, `revoked` unless it was."""

    entry: Entry
    ends: datetime | None
    revoked: datetime | None

    def told(self, now: datetime) -> str:
        """In words."""
        if self.ends is None:
            return "has not enrolled"
        if self.revoked:
            return f"revoked at {self.revoked:%Y-%m-%d %H:%M:%S} UTC"
        ended = "ran out at" if self.ends < now else "good until"
        return f"{ended} {self.ends:%Y-%m-%d %H:%M:%S} UTC"


class Register:
    """SQLite in the file at `path`: commands and the service use it side by side."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._transaction() as database:
            database.executescript(_TABLES)

    def add(self, entry: Entry) -> None:
        """Adds a node, or gives it other hosts. Raises ConfigError where its name is another's."""
        identity = entry.identity
        row = (identity.node, identity.role, json.dumps(identity.tenants), json.dumps(entry.hosts))
        with self._transaction() as database:
            sql = "SELECT role, tenants FROM nodes WHERE name = ?"
            known = database.execute(sql, (identity.node,)).fetchone()
            if known and tuple(known) != row[1:3]:
                wrong = f"there is a node {identity.node} of another role or tenant"
                raise ConfigError(f"{wrong}: choose another name")
            database.execute("INSERT OR REPLACE INTO nodes VALUES (?, ?, ?, ?)", row)

    def entry(self, node: str) -> Entry:
        """By its name, or as `trifold certs list` shows it. Raises ConfigError for one that is not there."""
        name = node.rpartition("/")[2]
        with self._transaction() as database:
            row = database.execute("SELECT * FROM nodes WHERE name = ?", (name,)).fetchone()
        found = _entry(row) if row else None
        if found is None or node not in (name, str(found.identity), *found.identity.uris):
            raise ConfigError(f"there is no node {node}: `trifold certs list` shows them")
        return found

    def expect(self, node: str, token: str, ends: datetime) -> None:
        """Lets a node enrol with a token until `ends`."""
        with self._transaction() as database:
            database.execute("INSERT INTO tokens VALUES (?, ?, ?)", (_hash(token), node, ends.timestamp()))

    def redeem(self, token: str) -> Entry | None:
        """The node that a token is for, which is used up by this; None for one that does not hold."""
        with self._transaction() as database:
            taken = database.execute(
                "DELETE FROM tokens WHERE hash = ? RETURNING node, ends", (_hash(token),)
            ).fetchone()
            if taken is None or taken["ends"] < datetime.now(UTC).timestamp():
                return None
            return _entry(database.execute("SELECT * FROM nodes WHERE name = ?", (taken["node"],)).fetchone())

    def issued(self, node: str, serial: int, ends: datetime) -> None:
        with self._transaction() as database:
            database.execute(
                "INSERT INTO certificates VALUES (?, ?, ?, NULL)", (str(serial), node, ends.timestamp())
            )

    def renewable(self, serial: int) -> Entry:
        """The node of a certificate. Raises Forbidden for one that was revoked, or never signed here."""
        with self._transaction() as database:
            found = database.execute(
                "SELECT nodes.* FROM nodes JOIN certificates ON nodes.name = certificates.node "
                "WHERE serial = ? AND revoked IS NULL",
                (str(serial),),
            ).fetchone()
        if found is None:
            raise Forbidden("the certificate is not one that the authority would renew: enrol the node anew")
        return _entry(found)

    def revoke(self, node: str) -> int:
        """Revokes every certificate of a node that runs, and its tokens; how many. Raises ConfigError."""
        name = self.entry(node).identity.node
        now = datetime.now(UTC).timestamp()
        with self._transaction() as database:
            database.execute("DELETE FROM tokens WHERE node = ?", (name,))
            revoked = database.execute(
                "UPDATE certificates SET revoked = ? WHERE node = ? AND revoked IS NULL AND ends > ?",
                (now, name, now),
            ).rowcount
            database.execute("INSERT INTO lists DEFAULT VALUES")
        return revoked

    def revoked(self) -> tuple[int, dict[int, datetime]]:
        """The number of the list of now, and the serials on it: what would run still, by when revoked."""
        with self._transaction() as database:
            number: int = database.execute("SELECT COALESCE(MAX(number), 0) FROM lists").fetchone()[0]
            rows = database.execute(
                "SELECT serial, revoked FROM certificates WHERE revoked IS NOT NULL AND ends > ?",
                (datetime.now(UTC).timestamp(),),
            ).fetchall()
        return number, {int(row["serial"]): _time(row["revoked"]) for row in rows}

    def nodes(self) -> list[Standing]:
        """All, by name."""
        with self._transaction() as database:
            rows = database.execute(
                "SELECT nodes.*, MAX(certificates.ends) AS ends, certificates.revoked FROM nodes "
                "LEFT JOIN certificates ON nodes.name = certificates.node GROUP BY name ORDER BY name"
            ).fetchall()
        return [
            Standing(
                _entry(row),
                None if row["ends"] is None else _time(row["ends"]),
                None if row["revoked"] is None else _time(row["revoked"]),
            )
            for row in rows
        ]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._path)) as database, database:
            database.row_factory = sqlite3.Row
            yield database


def _entry(row: sqlite3.Row) -> Entry:
    identity = Identity(tuple(json.loads(row["tenants"])), row["role"], row["name"])
    return Entry(identity, tuple(json.loads(row["hosts"])))


def _time(stamp: float) -> datetime:
    return datetime.fromtimestamp(stamp, UTC)


def _hash(token: str) -> str:
    """Of 32 random bytes, which need neither salt nor slowness."""
    return hashlib.sha256(token.encode()).hexdigest()
