"""The interceptor that answers what is no request: gRPC says UNKNOWN to it, and logs a traceback."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc.aio
from google.protobuf.message import DecodeError

from trifold.shared.errors import InvalidRequest
from trifold.shared.identity.gate import writing
from trifold.shared.session.status import abort

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Decoding(grpc.aio.ServerInterceptor):
    """A request that cannot be decoded ends its call with INVALID_ARGUMENT; streams decode their own."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        return _checked(handler)


def _checked(handler: Handler) -> Handler:
    kind = "unary_stream" if handler.response_streaming else "unary_unary"
    behaviour, decode = writing(getattr(handler, kind)), handler.request_deserializer
    assert decode

    def tried(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError:
            return InvalidRequest(f"a message of {len(data)} bytes is not a request of this call")

    async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if isinstance(request, InvalidRequest):
            await abort(context, request)
        return await behaviour(request, context)

    make = getattr(grpc, f"{kind}_rpc_method_handler")
    made: Handler = make(answer, tried, handler.response_serializer)
    return made
