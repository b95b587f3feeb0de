"""Keeps a node's certificate young, and a service's knowledge of revoked ones."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, Never

import grpc.aio

from trifold.proto.v1 import identity_pb2 as pb
from trifold.proto.v1.identity_pb2_grpc import AuthorityServiceStub
from trifold.shared.identity.node import Node
from trifold.shared.session.channel import connect
from trifold.shared.session.status import from_rpc_error, public

if TYPE_CHECKING:
    from trifold.proto.v1.identity_pb2_grpc import AuthorityServiceAsyncStub

_PAUSE: Final = 10.0
"""Seconds between two looks: a revocation is heard of within this time, and a call of the next line."""

_TIMEOUT: Final = 10.0

_LOOKS_A_LIFE: Final = 10
"""Certificates that live for seconds, as in a trial, are looked after more often."""

log = logging.getLogger(__name__)


class Keeper:
    """Looks after the certificate of `node`, by asking its authority, which may be away for a while.

    A service also asks who was `revoked`, and lets `looked` know after every look.
    """

    def __init__(
        self, node: Node, *, revoked: bool = False, looked: Callable[[], None] = lambda: None
    ) -> None:
        self._node = node
        self._revoked = revoked
        self._looked = looked
        self._problem = ""

    async def run(self) -> Never:
        while True:
            try:
                # Who has no authority to ask has other means, and puts another certificate into the folder.
                if self._node.authority_address:
                    await self.look()
                self._problem = ""
            except Exception as error:
                # Whatever it was: the next look is in a moment, and streams are looked at all the same.
                self._tell(public(error).message)
            self._looked()
            await asyncio.sleep(self._pause)

    async def look(self) -> None:
        """Learns who was revoked, and renews what is due.

        Raises what the authority refuses, or Unavailable.
        """
        if self._revoked or self._node.due:
            async with self._authority() as authority:
                if self._revoked:
                    answer = await authority.Revoked(pb.RevokedRequest(), timeout=_TIMEOUT)
                    self._node.revoked.take(answer.list)
                if self._node.due:
                    await self._renew(authority)

    async def renew(self) -> None:
        """Renews the certificate now.

        Raises what the authority refuses, Unauthenticated where it has run out, or Unavailable.
        """
        async with self._authority() as authority:
            await self._renew(authority)

    async def _renew(self, authority: AuthorityServiceAsyncStub) -> None:
        request = pb.RenewRequest(signing_request=self._node.signing_request())
        self._node.renew((await authority.Renew(request, timeout=_TIMEOUT)).chain)
        log.info(
            "the certificate was renewed: good until %s", self._node.papers.certificate.not_valid_after_utc
        )

    @asynccontextmanager
    async def _authority(self) -> AsyncIterator[AuthorityServiceAsyncStub]:
        address = self._node.authority_address
        try:
            async with connect(address, self._node) as channel:
                yield AuthorityServiceStub(channel)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, f"the authority at {address}") from None

    @property
    def _pause(self) -> float:
        certificate = self._node.papers.certificate
        life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
        return min(_PAUSE, life.total_seconds() / _LOOKS_A_LIFE)

    def _tell(self, problem: str) -> None:
        if problem != self._problem:
            papers = self._node.papers
            ends = papers.certificate.not_valid_after_utc
            log.warning(papers.ended or f"the certificate is good until {ends} and not renewed: {problem}")
        self._problem = problem
