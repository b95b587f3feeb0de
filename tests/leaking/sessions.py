"""Sessions as callers have them: to their end, cancelled, broken off, refused, taken over, and in error."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import grpc.aio
import httpx

from tests.site import Service
from tests.wire import Peer
from trifold.proto.v1 import generate_pb2
from trifold.proto.v1.generate_pb2_grpc import GenerateServiceStub
from trifold.shared.errors import DigestMismatch
from trifold.shared.session.channel import connect

_AT_A_TIME: Final = 8
_PROMPT: Final = list(range(1, 9))

Session = Callable[[], Awaitable[None]]


class Callers:
    """Who calls an edge over and over, and maybe a site's service in front of it."""

    def __init__(
        self, peer: Peer, digest: str, generate: Any = None, http: httpx.AsyncClient | None = None
    ) -> None:
        """`generate` and `http` are of the service, where there is one."""
        self._peer = peer
        self._digest = digest
        self._generate = generate
        self._http = http
        self.of_tiers: Sequence[Session] = [
            self._whole,
            self._broken_off,
            self._left_in_order,
            self._in_error,
            self._opened_only,
            self._refused,
            self._nonsense,
            self._taken_over,
        ]
        self.of_service: Sequence[Session] = []
        if generate:
            self.of_service = [self._answered, self._cancelled, self._invalid, self._over_http]

    @classmethod
    @asynccontextmanager
    async def of(cls, service: Service, digest: str) -> AsyncIterator[Callers]:
        """On connections of their own."""
        async with (
            Peer.at(service.tiers.edge, "EdgeService") as peer,
            connect(service.address) as channel,
            httpx.AsyncClient(base_url=service.url, timeout=60) as http,
        ):
            yield cls(peer, digest, GenerateServiceStub(channel).Generate, http)

    async def have(self, count: int) -> None:
        """`count` sessions of every kind in turn, some at a time."""
        kinds = itertools.islice(itertools.cycle([*self.of_tiers, *self.of_service]), count)

        async def call() -> None:
            for session in kinds:
                await session()

        async with asyncio.TaskGroup() as group:
            for _ in range(_AT_A_TIME):
                group.create_task(call())

    async def _begun(self) -> Any:
        talk = self._peer.call()
        await talk.open(self._digest, 16)
        await talk.send_tokens(_PROMPT, 0)
        await talk.result()
        return talk

    async def _whole(self) -> None:
        talk = await self._begun()
        for position in (8, 9):
            await talk.send_tokens([1], position)
            await talk.result()
        await talk.close()

    async def _broken_off(self) -> None:
        await (await self._begun()).drop()

    async def _left_in_order(self) -> None:
        await (await self._begun()).hang_up()

    async def _in_error(self) -> None:
        talk = await self._begun()
        await talk.send_tokens([1], 12)
        assert await talk.end()

    async def _opened_only(self) -> None:
        talk = self._peer.call()
        await talk.open(self._digest, 16)
        await talk.drop()

    async def _refused(self) -> None:
        talk = self._peer.call()
        with suppress(DigestMismatch):
            await talk.open("0" * 64, 16)

    async def _nonsense(self) -> None:
        talk = self._peer.call()
        await talk.say(b"\xff" * 40)
        assert await talk.end()

    async def _taken_over(self) -> None:
        talk, later = await self._begun(), self._peer.call()
        have = (await later.open(self._digest, 16, session=talk.session, epoch=2)).have
        await later.send_tokens([1], have)
        await later.result()
        assert await talk.end()
        await later.close()

    async def _answered(self) -> None:
        async for _ in self._generate(generate_pb2.GenerateRequest(text="import os", max_tokens=3)):
            pass

    async def _cancelled(self) -> None:
        call = self._generate(generate_pb2.GenerateRequest(text="import os", max_tokens=200))
        await call.read()
        call.cancel()

    async def _invalid(self) -> None:
        with suppress(grpc.aio.AioRpcError):
            async for _ in self._generate(generate_pb2.GenerateRequest(max_tokens=3)):
                pass

    async def _over_http(self) -> None:
        assert self._http
        asked = {"model": "trifold", "prompt": "import os", "max_tokens": 200, "stream": True}
        async with self._http.stream("POST", "/completions", json=asked) as answer:
            assert answer.status_code == 200
            async for _ in answer.aiter_lines():
                break
