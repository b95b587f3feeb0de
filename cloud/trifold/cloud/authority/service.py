"""The authority's two services: one for who has a token, one for who has a certificate."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final, Never, TypeVar

import grpc
import grpc.aio

from trifold.cloud.authority.authority import Authority
from trifold.proto.v1 import identity_pb2 as pb
from trifold.proto.v1.identity_pb2_grpc import (
    AuthorityServiceServicer,
    EnrolServiceServicer,
    add_AuthorityServiceServicer_to_server,
    add_EnrolServiceServicer_to_server,
)
from trifold.shared.identity.gate import certificate_of
from trifold.shared.session.channel import SERVER_OPTIONS
from trifold.shared.session.decoding import Decoding
from trifold.shared.session.door import Door
from trifold.shared.session.ports import check_free
from trifold.shared.session.status import abort, public

_NAME: Final = pb.DESCRIPTOR.services_by_name["AuthorityService"].full_name

_LOOK: Final = 2.0
"""Seconds between two looks at what the commands have written into the register."""

_FAREWELL: Final = 0.5

T = TypeVar("T")

log = logging.getLogger(__name__)


class Enrolling(EnrolServiceServicer):
    """Gives certificates for tokens. AuthorityService listens at `port`."""

    def __init__(self, authority: Authority, port: int) -> None:
        self._authority = authority
        self._port = port

    async def Enrol(self, request: pb.EnrolRequest, context: Any) -> pb.EnrolResponse:  # noqa: N802 - of gRPC
        chain = await _answer(context, lambda: self._authority.enrol(request.token, request.signing_request))
        authority = self._authority.root_pem
        return pb.EnrolResponse(chain=chain, authority=authority, authority_port=self._port)


class Renewing(AuthorityServiceServicer):
    """Gives nodes a certificate for the one they have, and tells whose were revoked."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority

    async def Renew(self, request: pb.RenewRequest, context: Any) -> pb.RenewResponse:  # noqa: N802 - of gRPC
        certificate = certificate_of(context)
        assert certificate is not None, "the gate lets nobody in without one"
        chain = await _answer(context, lambda: self._authority.renew(certificate, request.signing_request))
        return pb.RenewResponse(chain=chain)

    async def Revoked(self, _: pb.RevokedRequest, context: Any) -> pb.RevokedResponse:  # noqa: N802 - of gRPC
        return pb.RevokedResponse(list=await _answer(context, self._authority.revocation_list))


class AuthorityServer:
    """Both services of an authority, each at its HOST:PORT, from start() to stop()."""

    def __init__(self, authority: Authority, enrolment: str, renewal: str) -> None:
        """Raises ConfigError."""
        self.enrolment = enrolment
        self.renewal = renewal
        self.authority = authority
        authority.renew_own()
        # Whoever has no certificate yet knows this one by its fingerprint.
        pair = authority.enrolment_key, authority.enrolment
        self._credentials = grpc.ssl_server_credentials([pair])
        self._enrolling = grpc.aio.server(options=SERVER_OPTIONS, interceptors=[Decoding()])
        self._door = Door(renewal, _NAME, authority.node, every_tenant=True)
        assert self._door.node
        self._node = self._door.node
        self._looking: asyncio.Task[Never] | None = None

    async def start(self) -> None:
        """Raises ConfigError where it cannot listen."""
        for server in self._door.servers:
            add_AuthorityServiceServicer_to_server(Renewing(self.authority), server)
        self.renewal = await self._door.open()
        port = int(self.renewal.rpartition(":")[2])
        add_EnrolServiceServicer_to_server(Enrolling(self.authority, port), self._enrolling)
        check_free(self.enrolment)
        got = self._enrolling.add_secure_port(self.enrolment, self._credentials)
        self.enrolment = f"{self.enrolment.rpartition(':')[0]}:{got}"
        await self._enrolling.start()
        self._looking = asyncio.create_task(self._look())

    async def stop(self) -> None:
        if self._looking:
            self._looking.cancel()
        await asyncio.gather(self._enrolling.stop(_FAREWELL), self._door.close(_FAREWELL))

    async def _look(self) -> Never:
        while True:
            try:
                self._node.revoked.take(self.authority.revocation_list())
                if self._node.due:
                    self.authority.renew_own()
            except Exception:
                # A disk that is full, a register that is locked: the next look is in a moment.
                log.exception("the authority could not look after its own certificate")
            await asyncio.sleep(_LOOK)


async def _answer(context: grpc.aio.ServicerContext[Any, Any], work: Callable[[], T]) -> T:
    """The border: whatever the work raises becomes a status."""
    try:
        return work()
    except Exception as error:
        problem = public(error).with_traceback(None)
    return await abort(context, problem)
