"""How a call ended, as the peer said it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Final, TypeVar

import grpc.aio

from trifold.shared.errors import TrifoldError, Unavailable
from trifold.shared.session.status import MADE_UP, from_rpc_error

T = TypeVar("T")

_PATIENCE: Final = 1.0
"""Seconds to wait for the peer's status after a write has failed; a lost connection may bring none."""


def nonsense(name: str, what: str) -> TrifoldError:
    """The error for a peer that does not keep to the protocol."""
    return TrifoldError(f"{name} sent {what}: is it of the same version of Trifold?")


class Ending:
    """The end of a call to `peer`; to be made before the call's first write.

    The peer's status comes behind its last message. So read the call with `async for` (or anext), which goes
    on to its end even when a write has failed, and not with read(), which gives up then.
    """

    def __init__(self, call: grpc.aio.Call, peer: str) -> None:
        self._peer = peer
        self._status: grpc.aio.AioRpcError | None = None
        self._known = asyncio.Event()
        call.add_done_callback(self._note)

    async def error(self) -> TrifoldError:
        """The error that ended a call that has begun to end; Unavailable where the peer said just OK."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                await self._known.wait()
        if self._status is None:
            return Unavailable(f"{self._peer} was lost")
        if self._status.code() is grpc.StatusCode.OK:
            return Unavailable(f"{self._peer} ended the stream")
        return from_rpc_error(self._status, self._peer)

    def _note(self, call: grpc.aio.Call) -> None:
        """Called whenever the call gets a status: keeps the first that is not made up."""
        code, details = _now(call.code()), _now(call.details())
        if self._status is None and (code, details) != MADE_UP:
            self._status = grpc.aio.AioRpcError(code, None, _now(call.trailing_metadata()), details)
            self._known.set()


def _now(ready: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that has nothing to wait for."""
    try:
        ready.send(None)
    except StopIteration as result:
        value: T = result.value
        return value
    raise AssertionError("a call that is done tells its status at once")
