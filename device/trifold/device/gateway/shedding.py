"""Refusing what there is no place for, before any work is done for it."""

from __future__ import annotations

from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from trifold.device.gateway.problems import refusal
from trifold.device.service.places import Places
from trifold.shared.errors import Overloaded


class Shedding:
    """Answers requests to `paths` with 429 while they would have to wait too long for their place.

    Ahead of everything else, keys too: what a refusal costs is taken from those who are served. So it tells
    nothing of how many these are.
    """

    def __init__(self, app: ASGIApp, places: Places, paths: Collection[str]) -> None:
        self._app = app
        self._places = places
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in self._paths:
            try:
                self._places.check()
            except Overloaded as full:
                told = Overloaded("too many ask at a time: come again later", retry_after=full.retry_after)
                await refusal(told)(scope, receive, send)
                return
        await self._app(scope, receive, send)
