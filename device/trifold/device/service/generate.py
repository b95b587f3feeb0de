"""GenerateService: gRPC for clients that hold no shard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Final, cast

import grpc.aio

from trifold.device.client.chat import Message, Role
from trifold.device.client.generation import Generation
from trifold.device.service.desk import Desk, Piece
from trifold.device.service.journals import Journals
from trifold.device.service.keys import Caller
from trifold.proto.v1 import generate_pb2 as pb
from trifold.proto.v1.generate_pb2_grpc import GenerateServiceServicer
from trifold.shared.errors import InvalidRequest, StaleEpoch
from trifold.shared.identity.gate import certificate_of
from trifold.shared.identity.name import Identity
from trifold.shared.session.status import abort, public
from trifold.shared.session.stream import until_first
from trifold.shared.telemetry.request import begin_request

_ENDINGS: Final = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "content_filter": pb.FINISH_REASON_CONTENT_FILTER,
}

Context = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]


class GenerateService(GenerateServiceServicer):
    """Answers calls at a desk; those with a request id are written to a journal."""

    def __init__(self, desk: Desk, journals: Journals) -> None:
        self._desk = desk
        self._journals = journals
        self._running: dict[Path, _Run] = {}

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        """Writes to the context instead of yielding, so that a client that stops reading does not hold it."""
        begin_request()
        # Ahead of everything that may be cut short: else an error's status would send them once more, which
        # gRPC refuses, and the caller would wait for ever.
        await context.send_initial_metadata(())
        try:
            async with self._desk.within(self._desk.deadline()):
                await self._generate(request, context)
        except Exception as error:
            problem = public(error).with_traceback(None)
        else:
            return
        await abort(context, problem)

    async def _generate(self, request: pb.GenerateRequest, context: Context) -> None:
        caller = self._caller(context)
        if not request.request_id:
            await self._answer(caller, await self._begin(request, None), context)
            return
        asked = None if _says_nothing(request) else request.SerializeToString(deterministic=True)
        path = self._journals.path(caller, request.request_id, asked)
        async with self._taking_over(path) as run:
            if path.exists():
                generation = self._desk.client.resume(path)
            else:
                generation = await self._begin(request, path)
            await until_first(run.taken_over(), self._answer(caller, generation, context))

    def _caller(self, context: Context) -> Caller:
        if certificate := certificate_of(context):
            return self._desk.keys.node(str(Identity.of(certificate)))
        metadata = dict(context.invocation_metadata() or ())
        return self._desk.keys.caller(cast("str | None", metadata.get("authorization")))

    @asynccontextmanager
    async def _taking_over(self, path: Path) -> AsyncIterator[_Run]:
        """In place of the call that has the generation now, whose client may be lost without our knowing."""
        while before := self._running.get(path):
            await before.end()
        run = self._running[path] = _Run()
        try:
            yield run
        finally:
            del self._running[path]
            run.ended.set()

    async def _begin(self, request: pb.GenerateRequest, journal: Path | None) -> Generation:
        self._desk.places.check()
        prompt = await asyncio.to_thread(self._prompt, request)
        sampling = request.sampling
        return self._desk.client.generate(
            prompt,
            max_tokens=request.max_tokens or self._desk.room(prompt),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p or 1.0,
            seed=sampling.seed,
            stop=request.stop,
            logprobs=request.logprobs if request.HasField("logprobs") else None,
            journal=journal,
        )

    def _prompt(self, request: pb.GenerateRequest) -> list[int]:
        match request.WhichOneof("prompt"):
            case "text":
                return self._desk.client.tokenize(request.text)
            case "tokens":
                return list(request.tokens.ids)
            case "chat":
                turns = request.chat.turns
                return self._desk.client.chat_prompt([_message(turn) for turn in turns])
            case _:
                raise InvalidRequest("the request has no prompt: give text, chat or tokens")

    async def _answer(self, caller: Caller, generation: Generation, context: Context) -> None:
        tokens = 0
        async with aclosing(self._desk.answers(caller, [generation])) as pieces:
            async for _, piece in pieces:
                tokens += len(piece.token_ids)
                response = _response(piece)
                if piece.ending:
                    response.prompt_tokens = len(generation.request.prompt)
                    response.completion_tokens = tokens
                await context.write(response)


class _Run:
    """A call that has a journal, until a later one takes it over."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self._wanted = asyncio.Event()

    async def end(self) -> None:
        self._wanted.set()
        await self.ended.wait()

    async def taken_over(self) -> None:
        """Raises StaleEpoch when that happens."""
        await self._wanted.wait()
        raise StaleEpoch("a later call has taken the generation over")


def _says_nothing(request: pb.GenerateRequest) -> bool:
    return request == pb.GenerateRequest(request_id=request.request_id)


def _message(turn: pb.Turn) -> Message:
    role = "system" if turn.role == "developer" else turn.role
    if role not in ("system", "user", "assistant"):
        raise InvalidRequest(
            f"there is no role {turn.role!r}: a turn is of system, developer, user or assistant"
        )
    return Message(role=cast("Role", role), content=turn.content)


def _response(piece: Piece) -> pb.GenerateResponse:
    response = pb.GenerateResponse(
        text=piece.text,
        token_ids=piece.token_ids,
        finish_reason=_ENDINGS[piece.ending],
        replayed=piece.replayed,
    )
    if piece.logprobs:
        response.logprob.CopyFrom(pb.Logprob(token=piece.token_ids[0], logprob=piece.logprobs.token))
        response.top_logprobs.extend(pb.Logprob(token=i, logprob=value) for i, value in piece.logprobs.top)
    return response
