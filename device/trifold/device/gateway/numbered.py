"""Numbers for requests, in the log."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from trifold.shared.telemetry.request import begin_request


class Numbered:
    """Begins each request with a number of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begin_request()
        await self._app(scope, receive, send)
