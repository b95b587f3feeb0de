"""What OpenAI's clients get: the objects of answers, whole and as a stream of events."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from trifold.device.service.desk import Ending, Piece
from trifold.shared.runtime.sampling import Logprobs

_LEAST: Final = -9999.0
"""OpenAI's logarithm of a probability of 0, which JSON has no number for."""

Detokenize = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Told:
    """A token with its logprobs, and where in the text it stands."""

    token: int
    logprobs: Logprobs
    offset: int


@dataclass
class Choice:
    """One answer, as far as it has come."""

    text: str = ""
    tokens: int = 0
    ending: Ending | None = None
    told: list[Told] = field(default_factory=list)

    def add(self, piece: Piece) -> list[Told]:
        """Adds a piece; what it tells of its token, which only whole replies keep."""
        told = [Told(piece.token_ids[0], piece.logprobs, len(self.text))] if piece.logprobs else []
        self.text += piece.text
        self.tokens += len(piece.token_ids)
        self.ending = piece.ending
        return told


class Reply(ABC):
    """One reply of the API: `count` answers to prompts of `prompt_tokens` tokens altogether."""

    prefix: ClassVar[str]
    whole: ClassVar[str]
    part: ClassVar[str]

    def __init__(
        self, model: str, fingerprint: str, detokenize: Detokenize, *, count: int, prompt_tokens: int
    ) -> None:
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._detokenize = detokenize
        self._choices = [Choice() for _ in range(count)]
        self._prompt_tokens = prompt_tokens

    async def object(self, pieces: AsyncIterator[tuple[int, Piece]]) -> dict[str, Any]:
        """The reply when all pieces have come."""
        async for index, piece in pieces:
            self._choices[index].told += self._choices[index].add(piece)
        choices = [self._choice(index, choice) for index, choice in enumerate(self._choices)]
        return {**self._head, "object": self.whole, "choices": choices, "usage": self._usage()}

    async def events(
        self, pieces: AsyncIterator[tuple[int, Piece]], *, include_usage: bool
    ) -> AsyncIterator[dict[str, Any]]:
        """The reply as it comes."""
        usage: dict[str, Any] = {"usage": None} if include_usage else {}
        async for index, piece in pieces:
            choice = self._choices[index]
            first = not choice.tokens
            for part in self._parts(index, piece, choice.add(piece), first=first):
                yield {**self._head, "object": self.part, "choices": [part], **usage}
        if include_usage:
            yield {**self._head, "object": self.part, "choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        completion = sum(choice.tokens for choice in self._choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._prompt_tokens + completion,
        }

    @abstractmethod
    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """A whole answer."""

    @abstractmethod
    def _parts(self, index: int, piece: Piece, told: Sequence[Told], *, first: bool) -> list[dict[str, Any]]:
        """What a piece adds to an answer; whether it is the answer's first."""


class ChatReply(Reply):
    prefix = "chatcmpl"
    whole = "chat.completion"
    part = "chat.completion.chunk"

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.told),
            "finish_reason": choice.ending,
        }

    def _parts(self, index: int, piece: Piece, told: Sequence[Told], *, first: bool) -> list[dict[str, Any]]:
        parts = []
        if first:
            parts.append(_delta(index, {"role": "assistant", "content": ""}))
        logprobs = self._logprobs(told)
        if piece.text or logprobs:
            parts.append(_delta(index, {"content": piece.text}, logprobs))
        if piece.ending:
            parts.append(_delta(index, {}, ending=piece.ending))
        return parts

    def _logprobs(self, told: Sequence[Told]) -> dict[str, Any] | None:
        if not told:
            return None
        content = [
            self._token(one.token, one.logprobs.token)
            | {"top_logprobs": [self._token(*top) for top in one.logprobs.top]}
            for one in told
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._detokenize([token])
        whole = "\N{REPLACEMENT CHARACTER}" not in text
        return {
            "token": text,
            "logprob": max(logprob, _LEAST),
            "bytes": list(text.encode()) if whole else None,
        }


class CompletionReply(Reply):
    prefix = "cmpl"
    whole = "text_completion"
    part = "text_completion"

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "text": choice.text,
            "logprobs": self._logprobs(choice.told),
            "finish_reason": choice.ending,
        }

    def _parts(self, index: int, piece: Piece, told: Sequence[Told], *, first: bool) -> list[dict[str, Any]]:
        logprobs = self._logprobs(told)
        if not (piece.text or logprobs or piece.ending):
            return []
        part = {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.ending}
        return [part]

    def _logprobs(self, told: Sequence[Told]) -> dict[str, Any] | None:
        if not told:
            return None
        return {
            "tokens": [self._detokenize([one.token]) for one in told],
            "token_logprobs": [max(one.logprobs.token, _LEAST) for one in told],
            "top_logprobs": [
                {self._detokenize([token]): max(logprob, _LEAST) for token, logprob in one.logprobs.top}
                for one in told
            ],
            "text_offset": [one.offset for one in told],
        }


def _delta(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, ending: Ending | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": ending}
