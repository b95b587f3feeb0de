from __future__ import annotations

import json
from pathlib import Path

import pytest

from trifold.device.client.chat import ChatTemplate, Message
from trifold.shared.errors import InvalidRequest, UnsupportedModel

HELLO = [Message(role="system", content="Be brief."), Message(role="user", content="Hi <b>")]


def test_a_template_gets_messages_tokens_and_the_wish_for_an_answer() -> None:
    template = ChatTemplate(
        {
            "bos_token": {"content": "<s>", "lstrip": False},
            "eos_token": "</s>",
            "chat_template": """{{ bos_token }}
{%- for m in messages %}
{{ m.role }}={{ m['content'] }}{{ eos_token }}
{%- endfor %}
{% if add_generation_prompt %}assistant={% endif %}""",
        }
    )
    assert template.render(HELLO) == "<s>system=Be brief.</s>user=Hi <b></s>assistant="


def test_the_default_of_several_templates_is_taken() -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert ChatTemplate({"chat_template": named}).render(HELLO) == "yes"


def test_json_in_a_template_is_not_escaped_for_the_web() -> None:
    source = "{{ messages[1].content | tojson }}"
    assert ChatTemplate({"chat_template": source}).render(HELLO) == '"Hi <b>"'


def test_a_model_without_a_template_is_refused_with_what_to_do_instead() -> None:
    with pytest.raises(UnsupportedModel, match="trifold generate"):
        ChatTemplate({})


def test_a_template_that_is_not_jinja_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="not valid"):
        ChatTemplate({"chat_template": "{% for %}"})


def test_messages_that_a_template_refuses_are_an_error_with_its_words() -> None:
    template = ChatTemplate({"chat_template": "{{ raise_exception('users begin') }}"})
    with pytest.raises(InvalidRequest, match="users begin"):
        template.render(HELLO)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ strftime_now.__globals__['os'] }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(attack: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate({"chat_template": attack}).render(HELLO)


def test_the_reference_model_can_chat() -> None:
    config = Path("models/trifold-nano/tokenizer_config.json")
    text = ChatTemplate(json.loads(config.read_text())).render(HELLO)
    assert text.index("Be brief.") < text.index("Hi <b>")
