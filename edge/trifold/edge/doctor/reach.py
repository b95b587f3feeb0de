"""Why a service was not reached: gRPC says that it was not, and the layers below it say more."""

from __future__ import annotations

import ipaddress
import socket
import ssl
from datetime import UTC, datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from trifold.edge.doctor.finding import Finding, fault
from trifold.shared.errors import TrifoldError
from trifold.shared.identity.enrolment import HOST
from trifold.shared.identity.node import Node

_TIMEOUT: Final = 5.0
_TIME: Final = "%Y-%m-%d %H:%M:%S"
_CLOCK: Final = (
    "set the clocks of both machines (`timedatectl`), and renew or enrol whose certificate has run out"
)


def unreached(address: str, error: TrifoldError, node: Node | None) -> Finding:
    """A fault for a call to HOST:PORT that ended with `error`, as `node` or without TLS."""
    host, _, port = address.rpartition(":")
    place = host.strip("[]"), int(port)
    try:
        socket.create_connection(place, _TIMEOUT).close()
    except socket.gaierror as problem:
        return fault(
            f"{host} is no name that this machine can look up: {problem.strerror}", "mend the name or the DNS"
        )
    except ConnectionRefusedError:
        return fault(f"nothing listens at {address}", "start the service there, or give its HOST:PORT")
    except (TimeoutError, OSError) as problem:
        told = f"{address} cannot be reached: {problem.strerror or problem}"
        return fault(told, "look at the route and the firewalls on the way; is the machine on?")
    shown = _shown(place)
    if node is None:
        if shown is None:
            return fault(
                f"what listens at {address} does not answer: {error.message}",
                "is it the service that it should be?",
            )
        return fault(f"{address} speaks TLS", "give the folder of this node with --tls")
    if shown is None:
        return fault(
            f"{address} does not speak TLS", "start the service there with --tls, or give its right port"
        )
    return _wrong(address, host.strip("[]"), shown, node) or fault(
        f"{address} shows a good certificate, and does not talk to {node.identity}: {error.message}",
        "is the certificate of this node good, of the same authority, and not revoked?",
    )


def _wrong(address: str, host: str, shown: x509.Certificate, node: Node) -> Finding | None:
    """What is wrong with the certificate that a service shows to `node`."""
    now, begins, ends = datetime.now(UTC), shown.not_valid_before_utc, shown.not_valid_after_utc
    if not begins <= now <= ends:
        life, today = f"from {begins:{_TIME}} to {ends:{_TIME}}", f"{now:{_TIME}}"
        return fault(f"the certificate of {address} holds {life}, and here it is {today} UTC", _CLOCK)
    try:
        shown.verify_directly_issued_by(node.authority)
    except (ValueError, TypeError, InvalidSignature):
        if HOST in _hosts(shown):
            return fault(f"an authority answers at {address}, where nodes enrol", "give the right HOST:PORT")
        return fault(
            f"the certificate of {address} is of another authority than this node's",
            "is it the port of another service? If not, enrol both at one authority",
        )
    if host not in _hosts(shown):
        told = f"the certificate of {address} is for {', '.join(_hosts(shown)) or 'no host'}, not for {host}"
        return fault(told, f"write one of these, or enrol it anew with `trifold certs token --host {host}`")
    return None


def _hosts(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = [str(ipaddress.ip_address(str(ip))) for ip in names.get_values_for_type(x509.IPAddress)]
    return [*names.get_values_for_type(x509.DNSName), *addresses]


def _shown(place: tuple[str, int]) -> x509.Certificate | None:
    """The certificate that a service shows, whoever asks; None where it speaks no TLS."""
    try:
        return x509.load_pem_x509_certificate(ssl.get_server_certificate(place, timeout=_TIMEOUT).encode())
    except (OSError, ValueError):
        return None
