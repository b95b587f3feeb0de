"""The folder of an enrolled node: its key, its certificate, the authority's, and who was revoked."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

import trifold.shared.grpc_engine  # noqa: F401  # isort: skip - before grpc

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from trifold.shared import durable
from trifold.shared.errors import ConfigError, TrifoldError, Unauthenticated
from trifold.shared.identity import request
from trifold.shared.identity.name import Identity
from trifold.shared.identity.revocations import Revocations

KEY: Final = "key.pem"
CHAIN: Final = "chain.pem"
AUTHORITY: Final = "authority.pem"
ADDRESS: Final = "authority.json"
"""Where the authority renews certificates; none where they are renewed by other means."""

_REVOKED: Final = "revoked.crl"

log = logging.getLogger(__name__)


class Papers(NamedTuple):
    """A certificate of the node, as it lies in the folder and as what it says."""

    chain: bytes
    certificate: x509.Certificate
    identity: Identity

    @property
    def renewal(self) -> datetime:
        """Half-way through its life."""
        begins, ends = self.certificate.not_valid_before_utc, self.certificate.not_valid_after_utc
        return begins + (ends - begins) / 2

    @property
    def ended(self) -> str:
        """What to say and do when its life is over; empty before."""
        ends = self.certificate.not_valid_after_utc
        if datetime.now(UTC) <= ends:
            return ""
        told = f"the certificate of {self.identity} ran out at {ends:%Y-%m-%d %H:%M:%S} UTC"
        return f"{told}: enrol the node anew, into a new folder (`trifold node enroll`)"


class Node:
    """What a process knows of its node, whose certificate is renewed while it runs, by itself or another."""

    def __init__(self, folder: Path | str) -> None:
        """Raises ConfigError naming the file that is missing or wrong."""
        self._folder = Path(folder)
        self._key_pem = self._read(KEY)
        if (self._folder / KEY).stat().st_mode & 0o077:
            raise ConfigError(f"others may read {self._folder / KEY}: chmod 600, or enrol the node anew")
        self._key = self._private()
        self._authority_pem = self._read(AUTHORITY)
        self._authority = self._certificate(AUTHORITY, self._authority_pem)
        self._stamp = self._stamped()
        self._papers = self._load()
        self.revoked = Revocations(self._folder / _REVOKED, self._authority)

    @property
    def papers(self) -> Papers:
        """The certificate as it is now. One that was replaced by rubbish is told in the log."""
        if (stamp := self._stamped()) != self._stamp:
            self._stamp = stamp
            try:
                self._papers = self._load()
            except TrifoldError as error:
                log.error("goes on with the certificate it had: %s", error.message)
        return self._papers

    @property
    def identity(self) -> Identity:
        return self._papers.identity

    @property
    def authority(self) -> x509.Certificate:
        """The one that this node trusts."""
        return self._authority

    @property
    def authority_address(self) -> str:
        """HOST:PORT of the authority that renews the certificate; empty for none. Raises ConfigError."""
        if not (self._folder / ADDRESS).exists():
            return ""
        try:
            return str(json.loads(self._read(ADDRESS))["address"])
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{self._folder / ADDRESS} does not say where the authority is") from None

    @property
    def due(self) -> bool:
        """Whether the certificate is to be renewed: half of its life is over."""
        return datetime.now(UTC) >= self.papers.renewal

    def signing_request(self) -> bytes:
        """For the same key, in DER."""
        return request.signing_request(self._key)

    def renew(self, chain: bytes) -> None:
        """Puts a younger certificate in place of the one there is.

        Raises ConfigError for another key's, and where the node was enrolled anew meanwhile.
        """
        self._parse(chain)
        self._check_key()
        durable.write(self._folder / CHAIN, chain)

    def server_credentials(self) -> grpc.ServerCredentials:
        """Mutual TLS, with the certificate as it is when a connection begins.

        Raises ConfigError for one that has run out by now.
        """
        if ended := self.papers.ended:
            raise ConfigError(ended)
        return grpc.dynamic_ssl_server_credentials(self._offer(), self._offer, True)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Mutual TLS, with the certificate as it is now. Raises Unauthenticated for one that has run out."""
        papers = self.papers
        if papers.ended:
            raise Unauthenticated(papers.ended)
        return grpc.ssl_channel_credentials(self._authority_pem, self._key_pem, papers.chain)

    def _offer(self) -> grpc.ServerCertificateConfiguration:
        pair = self._key_pem, self.papers.chain
        return grpc.ssl_server_certificate_configuration([pair], self._authority_pem)

    def _load(self) -> Papers:
        return self._parse(self._read(CHAIN))

    def _parse(self, chain: bytes) -> Papers:
        certificate = self._certificate(CHAIN, chain)
        if certificate.public_key() != self._key.public_key():
            self._check_key()
            raise ConfigError(f"{self._folder / CHAIN} is not the certificate of the key beside it")
        return Papers(chain, certificate, Identity.of(certificate))

    def _check_key(self) -> None:
        if self._read(KEY) != self._key_pem:
            raise ConfigError(f"the node in {self._folder} was enrolled anew: restart what runs as it")

    def _private(self) -> ec.EllipticCurvePrivateKey:
        try:
            key = serialization.load_pem_private_key(self._key_pem, None)
        except (ValueError, TypeError):
            raise ConfigError(f"{self._folder / KEY} is not a private key") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(f"{self._folder / KEY} is not a key on an elliptic curve")
        return key

    def _certificate(self, name: str, pem: bytes) -> x509.Certificate:
        try:
            return x509.load_pem_x509_certificate(pem)
        except ValueError:
            raise ConfigError(f"{self._folder / name} is not a certificate") from None

    def _read(self, name: str) -> bytes:
        path = self._folder / name
        try:
            return path.read_bytes()
        except OSError as error:
            hint = "is it the folder of `trifold node enroll --into`?"
            raise ConfigError(f"{path} cannot be read ({error.strerror}): {hint}") from None

    def _stamped(self) -> tuple[int, int]:
        """Changes when the certificate does."""
        try:
            status = (self._folder / CHAIN).stat()
        except OSError:
            return (0, 0)
        return status.st_ino, status.st_mtime_ns
