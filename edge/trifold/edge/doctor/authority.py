"""The authority: does it answer this node, so that the certificate can be renewed?"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import datetime
from typing import Final

import grpc.aio
from cryptography import x509

from trifold.edge.doctor.check import Check
from trifold.edge.doctor.finding import Finding, fault, ok, skipped, warning
from trifold.edge.doctor.patient import Patient
from trifold.edge.doctor.reach import unreached
from trifold.proto.v1 import identity_pb2 as pb
from trifold.proto.v1.identity_pb2_grpc import AuthorityServiceStub
from trifold.shared.errors import TrifoldError, Unauthenticated, Unavailable
from trifold.shared.identity.node import Node
from trifold.shared.session.channel import connect
from trifold.shared.session.status import from_rpc_error

_TIMEOUT: Final = 5.0


def examine(patient: Patient) -> Iterator[Finding]:
    if patient.tls is None:
        yield skipped("no --tls was given")
        return
    node = Node(patient.tls)
    try:
        address = node.authority_address
        if not address:
            yield skipped("the node has none: its certificate is renewed by other means")
            return
        revoked = asyncio.run(_revoked(address, node))
    # Services go on without it until their certificates have run out, unless it refuses this node.
    except Unauthenticated as error:
        yield fault(error.message)
        return
    except Unavailable as error:
        found = unreached(address, error, node)
        yield warning(found.detail, found.remedy)
        return
    except TrifoldError as error:
        yield warning(error.message)
        return
    if revoked.get_revoked_certificate_by_serial_number(node.papers.certificate.serial_number):
        yield fault(f"the authority at {address} has revoked the certificate of this node")
    else:
        yield ok(f"{address} answers; {len(revoked)} certificates that have not run out are revoked")


def time_at(node: Node) -> datetime:
    """What the authority's clock says: it signs its list of revoked certificates as it is asked for it.

    Raises what it refuses, or Unavailable.
    """
    return asyncio.run(_revoked(node.authority_address, node)).last_update_utc


async def _revoked(address: str, node: Node) -> x509.CertificateRevocationList:
    async with connect(address, node) as channel:
        try:
            answer = await AuthorityServiceStub(channel).Revoked(pb.RevokedRequest(), timeout=_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, f"the authority at {address}") from None
    return x509.load_der_x509_crl(answer.list)


AUTHORITY = Check(
    "authority",
    examine,
    "ask who runs the authority: a revoked node needs a new token and `trifold node enroll`",
    as_node=True,
)
