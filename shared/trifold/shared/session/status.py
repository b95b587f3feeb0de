"""Errors on the wire: TrifoldError to gRPC status and back, and the border where others are translated."""

from __future__ import annotations

import logging
import secrets
from typing import Any, Final, Never

import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from trifold.shared.errors import (
    ERRORS,
    ConfigError,
    DeadlineExceeded,
    MessageTooLarge,
    TrifoldError,
    Unavailable,
)
from trifold.shared.telemetry.metrics import REFUSALS

DOMAIN: Final = "trifold"

_LONGEST_MESSAGE: Final = 500
"""Characters: a status travels in HTTP/2 headers, which are limited to 8 KiB."""

_BY_CODE: Final[dict[grpc.StatusCode, type[TrifoldError]]] = {
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.CANCELLED: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.RESOURCE_EXHAUSTED: MessageTooLarge,
    grpc.StatusCode.UNIMPLEMENTED: ConfigError,
}
"""What a status means that gRPC itself made up: a lost connection shows as CANCELLED or UNAVAILABLE."""

MADE_UP: Final = (grpc.StatusCode.INTERNAL, "Internal error from Core")
"""What grpc.aio puts in place of the peer's status when a call ends during a write (grpc issue 36066)."""

log = logging.getLogger(__name__)


def public(error: Exception) -> TrifoldError:
    """The error as others may see it. All but a TrifoldError is logged, and only a number told."""
    if isinstance(error, TrifoldError):
        log.info("refused or broken off: %s (%s)", error.message, error.reason)
        return error
    number = secrets.token_hex(4)
    log.error("internal error %s", number, exc_info=error)
    return TrifoldError(f"internal error {number}: the log of the service has the details")


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: TrifoldError) -> Never:
    """Ends a call with the status of an error."""
    REFUSALS.labels(error.reason).inc()
    details = [AnyMessage()]
    details[0].Pack(ErrorInfo(reason=error.reason, domain=DOMAIN))
    if error.retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after * 1e9))
        details.append(AnyMessage())
        details[1].Pack(RetryInfo(retry_delay=delay))
    code: int = error.grpc_status.value[0]
    status = Status(code=code, message=error.message[:_LONGEST_MESSAGE], details=details)
    await context.abort_with_status(rpc_status.to_status(status))


def from_rpc_error(error: grpc.aio.AioRpcError, peer: str = "the peer") -> TrifoldError:
    """The error that a call to `peer` ended with; one of gRPC's own says so, with the peer's name."""
    reason, retry_after = None, None
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            reason, retry_after = _details(value)
    if reason in ERRORS:
        return ERRORS[reason](error.details() or reason, retry_after=retry_after)
    made_up = (error.code(), error.details()) == MADE_UP
    kind = Unavailable if made_up else _BY_CODE.get(error.code(), TrifoldError)
    return kind(f"{peer}: {error.details() or error.code().name}")


def _details(value: str | bytes) -> tuple[str | None, float | None]:
    """Reason and retry_after of google.rpc.Status bytes; None where they are not ours."""
    reason, retry_after = None, None
    try:
        status = Status.FromString(value if isinstance(value, bytes) else value.encode())
        for detail in status.details:
            info, retry = ErrorInfo(), RetryInfo()
            if detail.Unpack(info) and info.domain == DOMAIN:
                reason = info.reason
            elif detail.Unpack(retry):
                retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    except DecodeError:
        return None, None
    return reason, retry_after
