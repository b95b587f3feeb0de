"""The HTTP gateway: OpenAI's API in front of a desk."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, Final, cast

from fastapi import APIRouter, Depends, FastAPI, Header, Request, Response
from fastapi.responses import JSONResponse

from trifold.device.gateway.bodies import ChatBody, CompletionBody
from trifold.device.gateway.events import EventStream, unless_gone
from trifold.device.gateway.limit import BodyLimit
from trifold.device.gateway.numbered import Numbered
from trifold.device.gateway.problems import ModelNotFound, answer_errors
from trifold.device.gateway.replies import ChatReply, CompletionReply, Reply
from trifold.device.gateway.shedding import Shedding
from trifold.device.service.desk import Desk, Piece
from trifold.device.service.keys import Caller
from trifold.shared.errors import InvalidRequest

_CHAT: Final = "/v1/chat/completions"
_COMPLETIONS: Final = "/v1/completions"

_MOST_ANSWERS: Final = 16
"""Answers that one request may ask for, over all its prompts."""

Pieces = AsyncGenerator[tuple[int, Piece], None]

router = APIRouter()


@dataclass(frozen=True)
class Served:
    """What the application is about."""

    desk: Desk
    model: str
    since: int

    @property
    def card(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": self.since, "owned_by": "trifold"}

    def check(self, model: str) -> None:
        if model != self.model:
            raise ModelNotFound(f"there is no model {model!r} here; there is {self.model!r}")


def gateway(desk: Desk, model: str) -> FastAPI:
    """The application; `model` is what clients call the model."""
    app = FastAPI(title="Trifold", docs_url=None, redoc_url=None)
    app.state.served = Served(desk, model, int(time.time()))
    app.add_middleware(BodyLimit)
    app.add_middleware(Numbered)
    app.add_middleware(Shedding, places=desk.places, paths=(_CHAT, _COMPLETIONS))
    app.include_router(router)
    answer_errors(app)
    return app


async def _served(request: Request) -> Served:
    return cast("Served", request.app.state.served)


Here = Annotated[Served, Depends(_served)]


async def _caller(here: Here, authorization: Annotated[str | None, Header()] = None) -> Caller:
    return here.desk.keys.caller(authorization)


Known = Annotated[Caller, Depends(_caller)]


@router.get("/health")
async def health(here: Here) -> dict[str, str]:
    await here.desk.describe()
    return {"status": "ok"}


@router.get("/v1/models")
async def models(here: Here, _: Known) -> dict[str, Any]:
    return {"object": "list", "data": [here.card]}


@router.get("/v1/models/{name:path}")
async def model(name: str, here: Here, _: Known) -> dict[str, Any]:
    here.check(name)
    return here.card


@router.post(_CHAT)
async def chat(body: ChatBody, request: Request, here: Here, caller: Known) -> Response:
    here.check(body.model)
    here.desk.places.check(body.n)
    messages = [turn.message for turn in body.messages]
    prompt = await asyncio.to_thread(here.desk.client.chat_prompt, messages)
    return await _answer(ChatReply, body, [prompt], request, here, caller)


@router.post(_COMPLETIONS)
async def completions(body: CompletionBody, request: Request, here: Here, caller: Known) -> Response:
    here.check(body.model)
    here.desk.places.check(body.n * len(body.prompt))
    prompts = [
        await asyncio.to_thread(here.desk.client.tokenize, prompt) if isinstance(prompt, str) else prompt
        for prompt in body.prompt
    ]
    return await _answer(CompletionReply, body, prompts, request, here, caller)


async def _answer(
    kind: type[Reply],
    body: ChatBody | CompletionBody,
    prompts: Sequence[list[int]],
    request: Request,
    here: Served,
    caller: Caller,
) -> Response:
    """Answer `number` to a prompt has the seed `seed + number`, so that `n` answers differ."""
    desk = here.desk
    deadline = desk.deadline()
    count = body.n * len(prompts)
    if not 0 < count <= _MOST_ANSWERS:
        raise InvalidRequest(f"{count} answers are asked for: it must be 1 to {_MOST_ANSWERS}")
    seed = secrets.randbits(63) if body.seed is None else body.seed
    generations = [
        desk.client.generate(
            prompt,
            max_tokens=body.length or desk.room(prompt),
            temperature=body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            seed=(seed + number) % 2**64,
            stop=body.stop,
            logprobs=body.told,
        )
        for prompt in prompts
        for number in range(body.n)
    ]
    reply = kind(
        here.model,
        f"trifold-{desk.client.digest[:12]}",
        desk.client.detokenize,
        count=count,
        prompt_tokens=sum(map(len, prompts)),
    )
    pieces = desk.answers(caller, generations)
    if not body.stream:
        return JSONResponse(await unless_gone(request, _whole(reply, pieces, desk, deadline)))
    # With the first piece at hand, what is refused has a status of its own and is no event.
    try:
        first = await unless_gone(request, _first(pieces, desk, deadline))
    except BaseException:
        await pieces.aclose()
        raise
    objects = reply.events(_from(first, pieces), include_usage=body.include_usage)
    return EventStream(objects, pieces, desk, deadline)


async def _whole(reply: Reply, pieces: Pieces, desk: Desk, deadline: float) -> dict[str, Any]:
    async with aclosing(pieces), desk.within(deadline):
        return await reply.object(pieces)


async def _first(pieces: Pieces, desk: Desk, deadline: float) -> tuple[int, Piece]:
    async with desk.within(deadline):
        return await anext(pieces)


async def _from(first: tuple[int, Piece], others: Pieces) -> AsyncIterator[tuple[int, Piece]]:
    yield first
    async for piece in others:
        yield piece
