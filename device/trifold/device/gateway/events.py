"""Answers on their way to a client over HTTP: given up when it leaves, ended when they take too long."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, Final, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from trifold.device.gateway.problems import problem
from trifold.device.service.desk import Desk
from trifold.shared.errors import Cancelled
from trifold.shared.session.status import public
from trifold.shared.session.stream import until_first

_FAREWELL: Final = 1.0
"""Seconds for the last words to a client that may have stopped listening."""

T = TypeVar("T")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work, which is cancelled when the client leaves. Raises Cancelled then."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        raise Cancelled("the client has left")

    working = asyncio.ensure_future(work)
    await until_first(working, gone())
    return working.result()


class EventStream(StreamingResponse):
    """Objects as server-sent events, made of `pieces`, which it closes. An error is the last one."""

    media_type = "text/event-stream"

    def __init__(
        self,
        objects: AsyncIterator[dict[str, Any]],
        pieces: AsyncGenerator[Any, None],
        desk: Desk,
        deadline: float,
    ) -> None:
        super().__init__(_events(objects), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._pieces = pieces
        self._desk = desk
        self._deadline = deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._pieces), self._desk.within(self._deadline):
                await until_first(self.stream_response(send), self.listen_for_disconnect(receive))
        except Exception as error:
            with suppress(TimeoutError):
                async with asyncio.timeout(_FAREWELL):
                    last = _event(problem(public(error)))
                    await send({"type": "http.response.body", "body": last, "more_body": False})


async def _events(objects: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    async for one in objects:
        yield _event(one)
    yield b"data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
