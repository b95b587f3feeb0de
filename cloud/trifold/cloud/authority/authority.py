"""The authority: a folder with its key, and who has a certificate of it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Self

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from trifold.cloud.authority import certificates
from trifold.cloud.authority.register import Entry, Register
from trifold.shared import durable
from trifold.shared.errors import ConfigError, Forbidden, InvalidRequest
from trifold.shared.identity import node as folder_of
from trifold.shared.identity.access import SERVED_BY
from trifold.shared.identity.enrolment import HOST, fingerprint
from trifold.shared.identity.name import Identity, Role
from trifold.shared.identity.request import key_pem, new_key, requested_key, write_private

LONGEST_LIFE: Final = timedelta(hours=24)

SERVICES: Final[frozenset[Role]] = frozenset(SERVED_BY.values())
"""Roles that others call: their certificates say at which hosts."""

_ROOT_LIFE: Final = timedelta(days=3650)

_BEHIND: Final = 100
"""A certificate begins this part of its life ago, for clocks that are behind."""

_NAME: Final = "authority"


class Authority:
    """The authority in a folder that init() has made. `life` is that of the certificates that it signs."""

    def __init__(self, folder: Path, life: timedelta = LONGEST_LIFE) -> None:
        """Raises ConfigError where there is none."""
        if not (folder / "root.key").exists():
            raise ConfigError(f"{folder} holds no authority: `trifold certs init` makes one")
        self.enrolment_key = (folder / "enrolment.key").read_bytes()
        self.enrolment = (folder / "enrolment.pem").read_bytes()
        self.root_pem = (folder / "root.pem").read_bytes()
        self.register = Register(folder / "register.sqlite")
        self.folder = folder
        self.node = folder / "node"
        self._life = min(life, LONGEST_LIFE)
        self.root = x509.load_pem_x509_certificate(self.root_pem)
        key = serialization.load_pem_private_key((folder / "root.key").read_bytes(), None)
        assert isinstance(key, certificates.Key)
        self._key = key

    @classmethod
    def init(cls, folder: Path, hosts: Sequence[str]) -> Self:
        """A new authority, which nodes reach at `hosts`. Raises ConfigError where there is one."""
        if (folder / "root.key").exists():
            raise ConfigError(f"{folder} holds an authority already: a new one would lock its nodes out")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        now, key, door = datetime.now(UTC), new_key(), new_key()
        durable.write(
            folder / "enrolment.pem", certificates.pem(certificates.pinned(door, HOST, now, _ROOT_LIFE))
        )
        write_private(folder / "enrolment.key", key_pem(door))
        durable.write(folder / "root.pem", certificates.pem(certificates.root(key, now, _ROOT_LIFE)))
        write_private(folder / "root.key", key_pem(key))
        authority = cls(folder)
        authority._found(hosts)
        return authority

    @property
    def fingerprint(self) -> str:
        """Of the certificate that new nodes see first."""
        return fingerprint(self.enrolment)

    def invite(self, identity: Identity, hosts: Sequence[str], life: timedelta) -> str:
        """A token with which the node enrols, once and soon. Raises ConfigError."""
        if identity.role in SERVICES and not hosts:
            raise ConfigError(
                f"{identity.role}s are called by others: say at which --host, as they will write it"
            )
        token = secrets.token_urlsafe(32)
        self.register.add(Entry(identity, tuple(hosts)))
        self.register.expect(identity.node, token, datetime.now(UTC) + life)
        return token

    def enrol(self, token: str, request: bytes) -> bytes:
        """The chain of a new node, in PEM. Raises Forbidden for a token that does not hold."""
        key = requested_key(request)
        entry = self.register.redeem(token)
        if entry is None:
            raise Forbidden("the token is unknown, used or too old: ask for another one")
        return self._issue(entry, key)

    def renew(self, certificate: x509.Certificate, request: bytes) -> bytes:
        """The chain that follows a certificate, of the same key, in PEM. Raises Forbidden, InvalidRequest."""
        key = requested_key(request)
        if key != certificate.public_key():
            raise InvalidRequest(
                "the signing request is for another key than the certificate: enrol the node anew"
            )
        return self._issue(self.register.renewable(certificate.serial_number), key)

    def revocation_list(self) -> bytes:
        """What is revoked now, signed, in DER."""
        number, serials = self.register.revoked()
        return certificates.revocation_list(self.root, self._key, serials, number, datetime.now(UTC))

    def renew_own(self) -> None:
        """Puts a young certificate into the folder of the authority's own service."""
        key = serialization.load_pem_private_key((self.node / folder_of.KEY).read_bytes(), None)
        public = key.public_key()
        assert isinstance(public, certificates.PublicKey)
        durable.write(self.node / folder_of.CHAIN, self._issue(self.register.entry(_NAME), public))

    def _found(self, hosts: Sequence[str]) -> None:
        """Enrols its own service."""
        identity = Identity((_NAME,), "authority", _NAME)
        self.node.mkdir()
        write_private(self.node / folder_of.KEY, key_pem(new_key()))
        durable.write(self.node / folder_of.AUTHORITY, self.root_pem)
        self.register.add(Entry(identity, tuple(hosts)))
        self.renew_own()

    def _issue(self, entry: Entry, key: certificates.PublicKey) -> bytes:
        begins = datetime.now(UTC) - self._life / _BEHIND
        serves = entry.identity.role in SERVICES
        certificate = certificates.node(
            self.root,
            self._key,
            key,
            uris=entry.identity.uris,
            hosts=entry.hosts,
            usages=certificates.SERVES if serves else certificates.CALLS,
            begins=begins,
            ends=begins + self._life,
        )
        ends = certificate.not_valid_after_utc
        self.register.issued(entry.identity.node, certificate.serial_number, ends)
        return certificates.pem(certificate)
