"""The certificates that an authority has revoked, as a node has heard it last."""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from trifold.shared import durable
from trifold.shared.errors import DamagedFile


class Revocations:
    """Kept in the file at `path`, so that a service that starts without its authority knows them, too."""

    def __init__(self, path: Path, authority: x509.Certificate) -> None:
        """Raises DamagedFile for a file that is no list of this authority."""
        self._path = path
        self._authority = authority
        self._number = -1
        self._serials: frozenset[int] = frozenset()
        if path.exists():
            self._learn(path.read_bytes())

    def __contains__(self, certificate: x509.Certificate) -> bool:
        return certificate.serial_number in self._serials

    def take(self, data: bytes) -> None:
        """Learns a newer list, in DER. Raises DamagedFile for one that the authority has not signed."""
        if self._learn(data):
            durable.write(self._path, data)

    def _learn(self, data: bytes) -> bool:
        """Whether the list was newer: an old one may be given again by whoever stands between."""
        try:
            given = x509.load_der_x509_crl(data)
            key = self._authority.public_key()
            assert isinstance(key, ec.EllipticCurvePublicKey)
            signed = given.is_signature_valid(key)
            number = given.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        except (ValueError, x509.ExtensionNotFound):
            raise DamagedFile("the list of revoked certificates is none") from None
        if not signed:
            raise DamagedFile("the list of revoked certificates is not signed by the authority of this node")
        if number <= self._number:
            return False
        self._number = number
        self._serials = frozenset(revoked.serial_number for revoked in given)
        return True
