"""Replies of OpenAI's API, as objects."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from trifold.device.gateway.replies import ChatReply
from trifold.device.service.desk import Piece
from trifold.shared.runtime.sampling import Logprobs

TOLD = Logprobs(-0.5, ((7, -0.5), (8, -1.5)))


def reply() -> ChatReply:
    return ChatReply("trifold", "fingerprint", lambda ids: "x" * len(ids), count=1, prompt_tokens=1)


async def pieces(count: int) -> AsyncIterator[tuple[int, Piece]]:
    for number in range(count):
        ending: Any = "stop" if number + 1 == count else None
        yield 0, Piece("x", (7,), ending, TOLD, replayed=False)


async def test_a_whole_reply_tells_of_every_token_and_a_stream_keeps_none_that_it_has_told() -> None:
    whole = await reply().object(pieces(5))
    assert len(whole["choices"][0]["logprobs"]["content"]) == 5
    streamed = reply()
    events = [event async for event in streamed.events(pieces(5), include_usage=False)]
    told = [event["choices"][0].get("logprobs") for event in events]
    assert sum(one is not None for one in told) == 5
    assert streamed._choices[0].told == []
