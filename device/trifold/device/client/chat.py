"""Chat: messages written as the text that the model was tuned on, by its tokenizer's own template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, Never, TypedDict

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trifold.shared.errors import InvalidRequest, UnsupportedModel

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One turn of a chat."""

    role: Role
    content: str


class ChatTemplate:
    """The Jinja template of a Hugging Face tokenizer, in a sandbox: a bundle may come from anywhere."""

    def __init__(self, tokenizer_config: dict[str, Any]) -> None:
        """Raises UnsupportedModel when there is no template or it is not Jinja."""
        source = tokenizer_config.get("chat_template")
        if isinstance(source, list):  # several named ones
            source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
        if not isinstance(source, str):
            raise UnsupportedModel("this model has no chat template: complete texts with `trifold generate`")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise UnsupportedModel(f"the chat template of this model is not valid: {error}") from None
        self._tokens = {
            name: _content(token)
            for name, token in tokenizer_config.items()
            if name.endswith("_token") and token
        }

    def render(self, messages: Sequence[Message]) -> str:
        """The text to be continued by the assistant. Raises InvalidRequest when the template refuses it."""
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._tokens)
        except Exception as error:  # whatever a template does, it is a template's doing
            raise InvalidRequest(f"the chat template refuses these messages: {error}") from None


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> Never:
    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)
