"""The errors of Trifold: one tree, one table of what each means on the wire, over HTTP and in a shell."""

from __future__ import annotations

from http import HTTPStatus
from typing import ClassVar, Final

import trifold.shared.grpc_engine  # noqa: F401  # isort: skip - before grpc

import grpc


class TrifoldError(Exception):
    """Something went wrong, told for a person: what, where, and what to do.

    Every class names its `reason` (stable, for machines), its gRPC and HTTP status and the exit code of a
    command that ends with it. `retry_after` is in seconds, or None where waiting does not help.
    """

    reason: ClassVar[str] = "INTERNAL"
    grpc_status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    http_status: ClassVar[HTTPStatus] = HTTPStatus.INTERNAL_SERVER_ERROR
    exit_code: ClassVar[int] = 70

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after


class InvalidRequest(TrifoldError):
    """The caller asked for something that can never work: a bad value, shape, dtype or frame."""

    reason = "INVALID_REQUEST"
    grpc_status = grpc.StatusCode.INVALID_ARGUMENT
    http_status = HTTPStatus.BAD_REQUEST
    exit_code = 64


class PromptTooLong(InvalidRequest):
    """Prompt and max_tokens do not fit the positions of the model."""

    reason = "PROMPT_TOO_LONG"


class BadRows(InvalidRequest):
    """Rows of a wrong length, codec or position, or with values that are not finite."""

    reason = "BAD_ROWS"


class MessageTooLarge(InvalidRequest):
    """A message above the limit of the wire."""

    reason = "MESSAGE_TOO_LARGE"
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class ConfigError(TrifoldError):
    """A setting that cannot be used: a flag, a TRIFOLD_* variable or a line of the TOML file."""

    reason = "CONFIG"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION
    http_status = HTTPStatus.INTERNAL_SERVER_ERROR
    exit_code = 78


class UnsupportedModel(TrifoldError):
    """A model that Trifold does not know how to split; the message names what is unsupported."""

    reason = "UNSUPPORTED_MODEL"
    grpc_status = grpc.StatusCode.UNIMPLEMENTED
    http_status = HTTPStatus.NOT_IMPLEMENTED
    exit_code = 65


class DamagedFile(TrifoldError):
    """A file of a checkpoint, bundle or journal that is missing, cut short or altered."""

    reason = "DAMAGED_FILE"
    grpc_status = grpc.StatusCode.DATA_LOSS
    http_status = HTTPStatus.INTERNAL_SERVER_ERROR
    exit_code = 66


class DigestMismatch(TrifoldError):
    """The tiers hold different bundles or adapters."""

    reason = "DIGEST_MISMATCH"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION
    http_status = HTTPStatus.CONFLICT
    exit_code = 65


class NotExact(TrifoldError):
    """The numerics self-test failed: this engine would not give the bits of the monolith."""

    reason = "NOT_EXACT"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION
    http_status = HTTPStatus.INTERNAL_SERVER_ERROR
    exit_code = 70


class Unauthenticated(TrifoldError):
    """A caller whose certificate does not hold: there is none, it was revoked, or it names no node."""

    reason = "UNAUTHENTICATED"
    grpc_status = grpc.StatusCode.UNAUTHENTICATED
    http_status = HTTPStatus.UNAUTHORIZED
    exit_code = 77


class Forbidden(TrifoldError):
    """A caller that is known and may not do this: by its role, or of a tenant that is not served."""

    reason = "FORBIDDEN"
    grpc_status = grpc.StatusCode.PERMISSION_DENIED
    http_status = HTTPStatus.FORBIDDEN
    exit_code = 77


class UnknownSession(TrifoldError):
    """A step for a session that this stream has not opened."""

    reason = "UNKNOWN_SESSION"
    grpc_status = grpc.StatusCode.NOT_FOUND
    http_status = HTTPStatus.NOT_FOUND
    exit_code = 69


class StaleEpoch(TrifoldError):
    """The session has been taken over by an Open with a higher epoch."""

    reason = "STALE_EPOCH"
    grpc_status = grpc.StatusCode.ABORTED
    http_status = HTTPStatus.CONFLICT
    exit_code = 75


class OutOfSequence(TrifoldError):
    """A step whose seq or base_pos leaves a gap."""

    reason = "OUT_OF_SEQUENCE"
    grpc_status = grpc.StatusCode.OUT_OF_RANGE
    http_status = HTTPStatus.CONFLICT
    exit_code = 75


class Overloaded(TrifoldError):
    """No room for another session now; `retry_after` says when to ask again."""

    reason = "OVERLOADED"
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = HTTPStatus.TOO_MANY_REQUESTS
    exit_code = 75


class Unavailable(TrifoldError):
    """A peer that is not there, is draining, or was lost; the session can be resumed."""

    reason = "UNAVAILABLE"
    grpc_status = grpc.StatusCode.UNAVAILABLE
    http_status = HTTPStatus.SERVICE_UNAVAILABLE
    exit_code = 69


class DeadlineExceeded(TrifoldError):
    """No answer within the time that was given."""

    reason = "DEADLINE_EXCEEDED"
    grpc_status = grpc.StatusCode.DEADLINE_EXCEEDED
    http_status = HTTPStatus.GATEWAY_TIMEOUT
    exit_code = 75


class Cancelled(TrifoldError):
    """The caller gave up the generation."""

    reason = "CANCELLED"
    grpc_status = grpc.StatusCode.CANCELLED
    # 499, "client closed request", is nginx's and not in the standard library.
    http_status = HTTPStatus.REQUEST_TIMEOUT
    exit_code = 130


def _tree(root: type[TrifoldError]) -> list[type[TrifoldError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


ERRORS: Final[dict[str, type[TrifoldError]]] = {error.reason: error for error in _tree(TrifoldError)}
"""Every class of error by its reason: the one table that the wire, HTTP and the shell share."""
