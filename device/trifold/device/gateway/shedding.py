"""Refusing what there is no place for, before any work is done for it."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from trifold.device.gateway.problems import refusal
from trifold.device.service.places import Places
from trifold.shared.errors import Overloaded


class Shedding:
    """Answers what asks for an answer with 429 while it would have to wait too long for its place.

    Ahead of everything else: what a refusal costs is taken from those who are served.
    """

    def __init__(self, app: ASGIApp, places: Places) -> None:
        self._app = app
        self._places = places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            try:
                self._places.check()
            except Overloaded as error:
                await refusal(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)
