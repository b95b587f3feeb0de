"""The interceptor at a service's door: every call is checked against the caller's certificate."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import grpc.aio
from cryptography import x509

from trifold.shared.errors import TrifoldError, Unauthenticated, Unavailable
from trifold.shared.identity import access
from trifold.shared.identity.name import Identity
from trifold.shared.identity.revocations import Revocations
from trifold.shared.session.status import abort
from trifold.shared.session.stream import until_first

Context = grpc.aio.ServicerContext[Any, Any]
Behaviour = Callable[[Any, Context], Any]


class Gate(grpc.aio.ServerInterceptor):
    """Lets those call who may, and ends the streams of those who may no longer.

    `tenants` are those that the service serves; None is all.
    """

    def __init__(self, revoked: Revocations, tenants: frozenset[str] | None) -> None:
        self._revoked = revoked
        self._tenants = tenants
        self._open: dict[asyncio.Future[None], x509.Certificate] = {}

    def sweep(self) -> None:
        """Ends the streams whose certificates are revoked, or over, by now."""
        for ending, certificate in self._open.items():
            try:
                self._check(certificate)
            except TrifoldError as error:
                if not ending.done():
                    ending.set_exception(error)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        return handler and self._guarded(handler_call_details.method, handler)

    def _guarded(
        self, method: str, handler: grpc.RpcMethodHandler[Any, Any]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        kinds = handler.request_streaming, handler.response_streaming
        kind = "_".join("stream" if streaming else "unary" for streaming in kinds)
        behaviour: Behaviour = getattr(handler, kind)
        if handler.response_streaming:
            behaviour = writing(behaviour)

        async def guarded(request: Any, context: Context) -> Any:
            try:
                certificate = self._admit(method, context)
                if not handler.response_streaming:
                    return await behaviour(request, context)
                with self._opened(certificate) as ending:
                    return await until_first(ending, behaviour(request, context))
            except TrifoldError as error:
                problem = error.with_traceback(None)
            return await abort(context, problem)

        make = getattr(grpc, f"{kind}_rpc_method_handler")
        made: grpc.RpcMethodHandler[Any, Any] = make(
            guarded, handler.request_deserializer, handler.response_serializer
        )
        return made

    def _admit(self, method: str, context: Context) -> x509.Certificate:
        """The caller's certificate. Raises Unauthenticated or Forbidden."""
        certificate = certificate_of(context)
        if certificate is None:
            raise Unauthenticated("the caller has no certificate")
        self._check(certificate)
        access.check(Identity.of(certificate), method, self._tenants)
        return certificate

    def _check(self, certificate: x509.Certificate) -> None:
        """Raises Unauthenticated for one that was revoked, Unavailable for one that has run out.

        TLS has looked at the dates, but when the connection began, which may be long ago.
        """
        if certificate in self._revoked:
            raise Unauthenticated(f"the certificate of {Identity.of(certificate)} was revoked")
        if not certificate.not_valid_before_utc <= datetime.now(UTC) <= certificate.not_valid_after_utc:
            told = f"the certificate of {Identity.of(certificate)} has run out"
            raise Unavailable(f"{told}: connect with the renewed one")

    @contextmanager
    def _opened(self, certificate: x509.Certificate) -> Iterator[asyncio.Future[None]]:
        """A stream of its caller; what it gives fails when the stream is to end."""
        ending: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._open[ending] = certificate
        try:
            yield ending
        finally:
            del self._open[ending]


def tenant_of(context: Context) -> str:
    """The tenant of a caller that a gate has let in; empty where there is none."""
    certificate = certificate_of(context)
    return Identity.of(certificate).tenants[0] if certificate else ""


def certificate_of(context: Context) -> x509.Certificate | None:
    """The caller's; None without TLS."""
    shown = [*context.auth_context().get("x509_pem_cert", ())]
    return _parsed(shown[0]) if shown else None


@lru_cache(maxsize=1024)
def _parsed(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def writing(behaviour: Behaviour) -> Behaviour:
    """A handler that writes its answers, where the one given may be a generator of them."""
    if not inspect.isasyncgenfunction(behaviour):
        return behaviour

    async def write(request: Any, context: Context) -> None:
        async for response in behaviour(request, context):
            await context.write(response)

    return write
