"""Who this node is, and how long its certificate holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from trifold.edge.doctor.check import Check
from trifold.edge.doctor.finding import Finding, fault, ok, skipped, warning
from trifold.edge.doctor.patient import Patient
from trifold.shared.identity.access import ACCESS
from trifold.shared.identity.node import Node

ENROL: Final = (
    "enrol it anew: `trifold certs token` at the authority, `trifold node enroll --into` a new folder here"
)


def examine(patient: Patient) -> Iterator[Finding]:
    if patient.tls is None:
        yield skipped("no --tls was given")
        return
    node = Node(patient.tls)
    certificate, now = node.papers.certificate, datetime.now(UTC)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    told = f"{node.identity}, good until {ends:%Y-%m-%d %H:%M:%S} UTC"
    if not _signed(node):
        yield fault(f"the certificate of {node.identity} is of another authority than the one beside it")
    elif now < begins:
        wait = f"the certificate of {node.identity} begins in {_span(begins - now)}"
        yield fault(f"{wait}: the clock here is behind, or the authority's was ahead", "set the clock")
    elif now > ends:
        yield fault(f"the certificate of {node.identity} ran out {_span(now - ends)} ago")
    elif certificate in node.revoked:
        yield fault(f"the certificate of {node.identity} was revoked")
    elif node.due:
        late = f"{told}: {_span(ends - now)} left, and it should have been renewed"
        hint = (
            f"`trifold node renew {patient.tls}`; is a service of this node running, and the authority there?"
        )
        yield warning(late, hint)
    else:
        yield ok(f"{told}: {_span(ends - now)} left, renewed in {_span(node.papers.renewal - now)}")
    calls = sorted(method.rpartition("/")[0].rpartition(".")[2] for method in _own_calls(node.identity.role))
    yield ok(f"role {node.identity.role}: may call {', '.join(calls) or 'Describe and health only'}")


def _signed(node: Node) -> bool:
    """Whether the chain ends at the authority that this node trusts."""
    for certificate in x509.load_pem_x509_certificates(node.papers.chain):
        with suppress(ValueError, TypeError, InvalidSignature):
            certificate.verify_directly_issued_by(node.authority)
            return True
    return False


def _own_calls(role: str) -> list[str]:
    """What this role may call and not every other, too."""
    widest = max(len(roles) for roles in ACCESS.values())
    return [method for method, roles in ACCESS.items() if role in roles and len(roles) < widest]


def _span(time: timedelta) -> str:
    """Hours and minutes, or days where there are many."""
    minutes = int(time.total_seconds()) // 60
    return f"{minutes // 1440} days" if minutes >= 2880 else f"{minutes // 60} h {minutes % 60} min"


CERTIFICATE = Check("certificate", examine, ENROL)
