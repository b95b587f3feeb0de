"""Errors as OpenAI's API tells them."""

from __future__ import annotations

import logging
import math
from http import HTTPStatus
from typing import Any

import grpc
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from trifold.shared.errors import (
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    TrifoldError,
    Unauthenticated,
)
from trifold.shared.session.status import public
from trifold.shared.telemetry.metrics import REFUSALS

log = logging.getLogger(__name__)

_CODES: dict[type[TrifoldError], str] = {
    Unauthenticated: "invalid_api_key",
    Overloaded: "rate_limit_exceeded",
    PromptTooLong: "context_length_exceeded",
}
"""Where programs expect another word than our reason."""


class ModelNotFound(TrifoldError):
    """A request for a model that is not served here."""

    reason = "MODEL_NOT_FOUND"
    grpc_status = grpc.StatusCode.NOT_FOUND
    http_status = HTTPStatus.NOT_FOUND
    exit_code = 69


def problem(error: TrifoldError) -> dict[str, Any]:
    """The error object of an error, which is counted."""
    REFUSALS.labels(error.reason).inc()
    if error.http_status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        log.warning("a request has failed: %s", error.message)
    return _object(
        error.message, error.http_status, code=_CODES.get(type(error), error.reason.lower()), param=None
    )


def refusal(error: TrifoldError) -> JSONResponse:
    """The answer to a request that ends with an error."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(problem(error), error.http_status, headers)


def answer_errors(app: FastAPI) -> None:
    """Whatever a route raises is answered with an error object."""
    app.add_exception_handler(TrifoldError, _trifold_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _trifold_error)


async def _trifold_error(_: Request, error: Exception) -> JSONResponse:
    return refusal(public(error))


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    REFUSALS.labels(InvalidRequest.reason).inc()
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    message = first["msg"].removeprefix("Value error, ")
    if first["loc"] == ("body",) and "json" not in request.headers.get("Content-Type", ""):
        message = "the body must be JSON, with the header Content-Type: application/json"
    elif param:
        message = f"{param}: {message}"
    status = HTTPStatus.BAD_REQUEST
    return JSONResponse(_object(message, status, code=InvalidRequest.reason.lower(), param=param), status)


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    return JSONResponse(
        _object(error.detail, status, code=status.name.lower(), param=None), status, error.headers
    )


def _object(message: str, status: HTTPStatus, *, code: str, param: str | None) -> dict[str, Any]:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        kind = "rate_limit_error"
    else:
        kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
