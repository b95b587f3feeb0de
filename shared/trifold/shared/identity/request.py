"""Keys of nodes, and the requests that ask an authority for a certificate."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from trifold.shared.errors import InvalidRequest


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def signing_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS #10 in DER. It names nobody: who the node is, the authority knows."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def requested_key(request: bytes) -> ec.EllipticCurvePublicKey:
    """The key that a request proves to have. Raises InvalidRequest."""
    try:
        asked = x509.load_der_x509_csr(request)
        key, proved = asked.public_key(), asked.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise InvalidRequest("the signing request is none") from None
    if not proved or not isinstance(key, ec.EllipticCurvePublicKey) or key.key_size != 256:
        raise InvalidRequest("the signing request is not signed with a key on the curve P-256")
    return key


def write_private(path: Path, data: bytes) -> None:
    """A file that nobody else may read, not even while it is written."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
