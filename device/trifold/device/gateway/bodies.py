"""What OpenAI's clients send: the bodies of requests, checked.

What cannot be done is refused, never left out in silence; parameters that do not change an answer, or ask
for nothing, are let through.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from trifold.device.client.chat import Message

_NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Values that ask for nothing, of parameters that are not supported otherwise."""

_WITHOUT_EFFECT: Final = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}


def _content(value: object) -> object:
    """The text of content that comes in parts. Raises ValueError for a part that is no text."""
    if not isinstance(value, list):
        return value
    if any(not isinstance(part, dict) or part.get("type") != "text" for part in value):
        raise ValueError("this model takes parts of type text only")
    return "".join(str(part.get("text", "")) for part in value)


class Body(BaseModel):
    """A null stands for what is not given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class Turn(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)]

    @property
    def message(self) -> Message:
        return Message(role="system" if self.role == "developer" else self.role, content=self.content)


class Parameters(Body):
    """What both kinds of completion have."""

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    n: int = Field(1, ge=1, le=16)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list, max_length=4)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, neutral in _NEUTRAL.items():
            if name in data and name not in cls.model_fields and data[name] not in (*neutral, None):
                raise ValueError(f"{name} is not supported")
        return {k: v for k, v in data.items() if k not in _NEUTRAL and k not in _WITHOUT_EFFECT}

    @field_validator("stop", mode="before")
    @classmethod
    def _several(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Parameters:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options are for requests with stream")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(Parameters):
    """/v1/chat/completions"""

    messages: list[Turn] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @model_validator(mode="after")
    def _logprobs_are_asked_for(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs are for requests with logprobs")
        return self

    @property
    def length(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def told(self) -> int | None:
        """Of how many of the likeliest tokens the probability is told; None where of none at all."""
        return self.top_logprobs if self.logprobs else None


class CompletionBody(Parameters):
    """/v1/completions"""

    prompt: list[str] | list[list[int]]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=5)

    @field_validator("prompt", mode="before")
    @classmethod
    def _many(cls, value: object) -> object:
        """One prompt is a text or token ids; several are a list of these."""
        one = isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int))
        return [value] if one else value

    @property
    def length(self) -> int | None:
        return self.max_tokens

    @property
    def told(self) -> int | None:
        return self.logprobs
