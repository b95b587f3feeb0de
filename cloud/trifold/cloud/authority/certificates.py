"""X.509 as Trifold uses it: a root, the certificates of nodes below it, and lists of revoked ones."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

Key = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey

CALLS: Final = (ExtendedKeyUsageOID.CLIENT_AUTH,)
SERVES: Final = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)
"""A service calls, too: others, and the authority that renews it."""


def root(key: Key, begins: datetime, life: timedelta) -> x509.Certificate:
    """The authority's own: it signs certificates of nodes, and those sign nothing."""
    name = _named("Trifold authority")
    builder = _builder(name, name, key.public_key(), begins, begins + life)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return builder.add_extension(_usage(signs=True), critical=True).sign(key, hashes.SHA256())


def pinned(key: Key, host: str, begins: datetime, life: timedelta) -> x509.Certificate:
    """Self-signed, for whoever knows its fingerprint."""
    builder = _builder(_named(host), _named(host), key.public_key(), begins, begins + life)
    return _of_a_node(builder, [x509.DNSName(host)], SERVES[1:]).sign(key, hashes.SHA256())


def node(
    authority: x509.Certificate,
    key: Key,
    public: PublicKey,
    *,
    uris: Iterable[str],
    hosts: Sequence[str] = (),
    usages: Sequence[ObjectIdentifier] = CALLS,
    begins: datetime,
    ends: datetime,
) -> x509.Certificate:
    """For the node that `uris` name, of `public`, reached at `hosts`; signed with the authority's `key`."""
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
    names += [host_name(host) for host in hosts]
    builder = _builder(x509.Name([]), authority.subject, public, begins, ends)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    builder = builder.add_extension(issuer, critical=False)
    return _of_a_node(builder, names, usages).sign(key, hashes.SHA256())


def revocation_list(
    authority: x509.Certificate, key: Key, serials: dict[int, datetime], number: int, at: datetime
) -> bytes:
    """DER. `serials` by when they were revoked; a list of a higher `number` is newer."""
    builder = x509.CertificateRevocationListBuilder().issuer_name(authority.subject)
    builder = builder.last_update(at).next_update(at + timedelta(hours=1))
    builder = builder.add_extension(x509.CRLNumber(number), critical=False)
    for serial, when in serials.items():
        revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(when).build()
        builder = builder.add_revoked_certificate(revoked)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def host_name(host: str) -> x509.GeneralName:
    """Of a DNS name or an IP address."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, public: PublicKey, begins: datetime, ends: datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(begins).not_valid_after(ends)
    identifier = x509.SubjectKeyIdentifier.from_public_key(public)
    return builder.add_extension(identifier, critical=False)


def _of_a_node(
    builder: x509.CertificateBuilder, names: Iterable[x509.GeneralName], usages: Sequence[ObjectIdentifier]
) -> x509.CertificateBuilder:
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    # The subject is empty: what stands in its place is then critical (RFC 5280, 4.2.1.6).
    return builder.add_extension(x509.SubjectAlternativeName(names), critical=True)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
