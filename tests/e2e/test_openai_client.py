"""OpenAI's own client against `trifold device serve` over a split trifold-nano, everything a process."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import ssl
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, DefaultHttpxClient, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.identities import HOST, enrolled
from tests.processes import Processes
from tests.site import Service, over_a_slow_link
from trifold.cloud.authority.authority import Authority
from trifold.cloud.split.split import split
from trifold.device import Client, Message
from trifold.device.service.keys import add_key
from trifold.shared.bundle.manifest import Cuts
from trifold.shared.identity.name import Role
from trifold.shared.model.checkpoint import Checkpoint

ROLES_OF_A_SITE: tuple[Role, ...] = ("core", "edge", "gateway")
NANO = Path("models/trifold-nano")
HELLO: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How do I read a file?"},
]


@pytest.fixture(scope="module")
def tiers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    bundle = tmp_path_factory.mktemp("nano") / "bundle"
    checkpoint = Checkpoint.open(NANO)
    split(checkpoint, Cuts(edge=1, cloud=len(checkpoint.spec.layers)), bundle)
    with Processes(bundle) as running:
        yield running


@pytest.fixture(scope="module")
def service(tiers: Processes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tiers, tmp_path_factory.mktemp("journals")) as running:
        yield running


@pytest.fixture
def client(service: Service) -> Iterator[OpenAI]:
    with service.openai() as client:
        yield client


def chat(client: OpenAI, **options: Any) -> Any:
    options = {"model": "trifold", "messages": HELLO, "max_tokens": 24, "seed": 7} | options
    create: Any = client.chat.completions.create
    return create(**options)


def complete(client: OpenAI, **options: Any) -> Any:
    options = {"model": "trifold", "prompt": "import os\n", "max_tokens": 24, "seed": 7} | options
    create: Any = client.completions.create
    return create(**options)


def test_a_chat_is_that_of_the_sdk(tiers: Processes, client: OpenAI) -> None:
    answer = chat(client, temperature=0)
    with Client(tiers.edge, bundle=tiers.bundle) as sdk:
        said = [Message(role=m["role"], content=m["content"]) for m in HELLO]  # type: ignore[typeddict-item]
        prompt = sdk.chat_prompt(said)
        chunks = list(sdk.generate(prompt, max_tokens=24))
    assert answer.choices[0].message.content == "".join(chunk.text for chunk in chunks)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(chunks)
    assert answer.usage.total_tokens == len(prompt) + len(chunks)
    assert answer.choices[0].finish_reason == chunks[-1].finish_reason


def test_a_stream_gives_the_same_text_in_pieces_and_the_usage_if_asked_for(client: OpenAI) -> None:
    whole = chat(client)
    events = list(chat(client, stream=True, stream_options={"include_usage": True}))
    *parts, last = events
    deltas = [part.choices[0].delta for part in parts]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert [part.choices[0].finish_reason for part in parts if part.choices[0].finish_reason] == ["length"]
    assert (last.choices, last.usage) == ([], whole.usage)
    assert len({event.id for event in events}) == 1
    assert all(event.usage is None for event in chat(client, stream=True))


def test_the_same_seed_gives_the_same_text_and_another_another(client: OpenAI) -> None:
    first, again, other = (chat(client, seed=seed).choices[0].message.content for seed in (5, 5, -6))
    assert first == again
    assert first != other
    unseeded = {chat(client, seed=None).choices[0].message.content for _ in range(3)}
    assert len(unseeded) == 3


def test_a_stop_string_ends_the_text_before_it(client: OpenAI) -> None:
    text = chat(client).choices[0].message.content
    stop = text[5:8]
    stopped = chat(client, stop=[stop, "never said"])
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    streamed = chat(client, stop=stop, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in streamed) == text[: text.index(stop)]


def test_logprobs_of_a_chat_spell_its_text(client: OpenAI) -> None:
    choice = chat(client, temperature=0, logprobs=True, top_logprobs=3).choices[0]
    told = choice.logprobs.content
    assert "".join(token.token for token in told) == choice.message.content
    assert b"".join(bytes(token.bytes) for token in told).decode() == choice.message.content
    for token in told:
        tops = [top.logprob for top in token.top_logprobs]
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, tops[0])
        assert tops == sorted(tops, reverse=True)
        assert len(tops) == 3
        assert token.logprob <= 0
    streamed = [
        part.choices[0].logprobs.content
        for part in chat(client, temperature=0, logprobs=True, top_logprobs=3, stream=True)
        if part.choices[0].logprobs
    ]
    assert [token for content in streamed for token in content] == told
    assert chat(client, temperature=0).choices[0].logprobs is None


def test_logprobs_of_a_completion_stand_where_the_tokens_do(client: OpenAI) -> None:
    choice = complete(client, temperature=0, logprobs=2).choices[0]
    told = choice.logprobs
    for token, offset, top in zip(told.tokens, told.text_offset, told.top_logprobs, strict=True):
        assert choice.text[offset:].startswith(token)
        assert token in top
        assert len(top) == 2
    assert len(told.token_logprobs) == len(told.tokens)


def test_several_answers_differ_and_the_first_is_the_one_that_comes_alone(client: OpenAI) -> None:
    alone = chat(client)
    several = chat(client, n=3)
    texts = [choice.message.content for choice in several.choices]
    assert texts[0] == alone.choices[0].message.content
    assert len(set(texts)) == 3
    assert several.usage.prompt_tokens == alone.usage.prompt_tokens
    assert several.usage.completion_tokens == 72
    streamed = ["", "", ""]
    for part in chat(client, n=3, stream=True):
        streamed[part.choices[0].index] += part.choices[0].delta.content or ""
    assert streamed == texts


def test_prompts_come_as_text_as_tokens_or_as_several(tiers: Processes, client: OpenAI) -> None:
    text = complete(client).choices[0].text
    with Client(tiers.edge, bundle=tiers.bundle) as sdk:
        asked = sdk.generate("import os\n", max_tokens=24, temperature=1, seed=7)
        assert text == "".join(chunk.text for chunk in asked)
    both = complete(client, prompt=["import os\n", "def main():"])
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == text
    ids = complete(client, prompt=[5, 6, 7])
    assert ids.usage.prompt_tokens == 3
    assert "".join(part.choices[0].text for part in complete(client, stream=True)) == text


def test_a_developer_speaks_as_the_system_and_content_may_come_in_parts(client: OpenAI) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "How do I "}, {"type": "text", "text": "read a file?"}],
        },
    ]
    assert chat(client, messages=messages).choices[0].message == chat(client).choices[0].message


def test_an_answer_can_be_sent_back_as_a_message(client: OpenAI) -> None:
    said = chat(client).choices[0].message
    assert chat(client, messages=[*HELLO, said, {"role": "user", "content": "Why?"}]).choices


def test_the_models_are_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["trifold"]
    assert client.models.retrieve("trifold").object == "model"


@pytest.mark.parametrize(
    ("options", "error", "code", "words"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found", "'trifold'"),
        ({"max_tokens": 2000}, openai.BadRequestError, "context_length_exceeded", "1024 positions"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_request", "temperature: "),
        ({"messages": []}, openai.BadRequestError, "invalid_request", "messages: "),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "invalid_request", "tools is not supp"),
        ({"frequency_penalty": 0.5}, openai.BadRequestError, "invalid_request", "frequency_penalty"),
        ({"stop": [""]}, openai.BadRequestError, "invalid_request", "stop.0"),
        ({"n": 17}, openai.BadRequestError, "invalid_request", "n: "),
        ({"extra_body": {"nonsense": 1}}, openai.BadRequestError, "invalid_request", "nonsense"),
        ({"logprobs": True, "top_logprobs": 21}, openai.BadRequestError, "invalid_request", "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "invalid_request", "stream"),
    ],
)
def test_what_cannot_be_done_is_an_error_of_the_client(
    client: OpenAI, options: dict[str, Any], error: type[openai.APIStatusError], code: str, words: str
) -> None:
    for stream in ({}, {"stream": True}) if "stream_options" not in options else ({},):
        with pytest.raises(error) as raised:
            chat(client, **options, **stream)
        assert raised.value.code == code
        assert words in raised.value.message
        assert raised.value.type == "invalid_request_error"


def test_what_asks_for_nothing_is_let_through(client: OpenAI) -> None:
    neutral = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "user": "me",
        "store": False,
    }
    plain = chat(client).choices[0].message
    assert chat(client, **neutral, response_format={"type": "text"}).choices[0].message == plain


def test_a_body_that_is_too_large_or_no_json_is_refused(service: Service) -> None:
    host = service.url.split("/")[2]
    for body, status in ((b"x" * (5 << 20), 413), (b"{", 400), (b"\xff", 400)):
        connection = http.client.HTTPConnection(host)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == status
        assert json.loads(answer.read())["error"]["message"]
        connection.close()


def test_a_body_that_is_not_said_to_be_json_is_told_what_to_say(service: Service) -> None:
    connection = http.client.HTTPConnection(service.url.split("/")[2])
    asked = json.dumps({"model": "trifold", "prompt": "x"})
    connection.request(
        "POST", "/v1/completions", asked, {"Content-Type": "application/x-www-form-urlencoded"}
    )
    answer = connection.getresponse()
    assert answer.status == 400
    assert "Content-Type: application/json" in json.loads(answer.read())["error"]["message"]
    connection.close()


async def test_a_client_that_leaves_a_stream_frees_the_sessions(tiers: Processes, tmp_path: Path) -> None:
    def leave(service: Service) -> None:
        with service.openai() as client, complete(client, max_tokens=900, n=2, stream=True) as stream:
            next(stream)
            assert service.sessions() == 2
        service.wait_until_no_session_is_left()

    async with over_a_slow_link(tiers, tmp_path) as service:
        await asyncio.to_thread(leave, service)


async def test_a_client_that_leaves_a_whole_answer_frees_the_sessions(
    tiers: Processes, tmp_path: Path
) -> None:
    def leave(service: Service) -> None:
        with service.openai() as client, pytest.raises(openai.APITimeoutError):
            complete(client, max_tokens=900, n=2, timeout=2)
        assert service.sessions() <= 2
        service.wait_until_no_session_is_left()

    async with over_a_slow_link(tiers, tmp_path) as service:
        await asyncio.to_thread(leave, service)


def test_a_client_that_reads_nothing_holds_its_session_until_the_timeout(
    tiers: Processes, tmp_path: Path
) -> None:
    with Service(tiers, tmp_path, "--timeout", "2") as service:
        connection = http.client.HTTPConnection(service.url.split("/")[2])
        asked = {"model": "trifold", "prompt": "x", "max_tokens": 1000, "n": 16, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
        time.sleep(0.5)
        service.wait_until_no_session_is_left()
        connection.close()


def test_an_answer_that_takes_too_long_is_an_error_in_a_stream_and_out_of_one(
    tiers: Processes, tmp_path: Path
) -> None:
    with Service(tiers, tmp_path, "--timeout", "0.4") as service, service.openai() as client:
        with pytest.raises(openai.InternalServerError, match=r"after 0.4 s") as late:
            complete(client, max_tokens=1000, n=8)
        assert late.value.status_code == 504
        with pytest.raises(openai.APIError, match=r"after 0.4 s"):
            list(complete(client, max_tokens=1000, n=8, stream=True))
        service.wait_until_no_session_is_left()


def test_32_clients_at_once_each_get_their_own_answer(service: Service) -> None:
    def text(seed: int) -> str:
        with service.openai() as client:
            if seed % 2:
                return str(complete(client, seed=seed).choices[0].text)
            return "".join(part.choices[0].text for part in complete(client, seed=seed, stream=True))

    alone = [text(seed) for seed in range(32)]
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(text, range(32))) == alone
    assert len(set(alone)) > 28
    service.wait_until_no_session_is_left()


def test_without_a_key_that_is_known_nobody_is_served(tiers: Processes, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    key = add_key(keys, "alice")
    with Service(tiers, tmp_path, "--keys", str(keys)) as service:
        with service.openai("tf-wrong") as stranger, pytest.raises(openai.AuthenticationError) as refused:
            complete(stranger)
        assert refused.value.code == "invalid_api_key"
        with service.openai(key) as alice:
            assert complete(alice).choices
            keys.write_text("")
            with pytest.raises(openai.AuthenticationError):
                complete(alice)
        host = service.url.removesuffix("/v1")
        health = subprocess.run(["curl", "--silent", f"{host}/health"], capture_output=True, check=True)
        assert json.loads(health.stdout) == {"status": "ok"}


def test_above_its_rate_a_key_is_told_when_to_come_back(tiers: Processes, tmp_path: Path) -> None:
    with Service(tiers, tmp_path, "--requests-per-minute", "2") as service, service.openai() as client:
        for _ in range(2):
            complete(client)
        with pytest.raises(openai.RateLimitError) as refused:
            complete(client)
        assert refused.value.code == "rate_limit_exceeded"
        assert 20 <= int(refused.value.response.headers["retry-after"]) <= 30
    with Service(tiers, tmp_path, "--tokens-per-minute", "60") as service, service.openai() as client:
        used = complete(client, max_tokens=40).usage.total_tokens
        with pytest.raises(openai.RateLimitError):
            complete(client, max_tokens=60 - used + 20)
        with pytest.raises(openai.BadRequestError, match="60 a minute"):
            complete(client, max_tokens=100)


async def test_answers_wait_for_their_place_and_who_would_wait_long_is_told_to_come_later(
    tiers: Processes, tmp_path: Path
) -> None:
    async with (
        over_a_slow_link(tiers, tmp_path, "--streams", "1") as service,
        AsyncOpenAI(base_url=service.url, api_key="none", max_retries=0) as client,
    ):
        asked = [
            asyncio.create_task(
                client.completions.create(model="trifold", prompt="x", max_tokens=900, stream=True)
            )
            for _ in range(20)
        ]
        async with asyncio.timeout(30):
            while sum(task.done() for task in asked) < 17:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        running = [task.result() for task in asked if task.done() and not task.exception()]
        refused = [task.exception() for task in asked if task.done() and task.exception()]
        assert (len(running), len(refused)) == (1, 16)
        for error in refused:
            assert isinstance(error, openai.RateLimitError)
            assert int(error.response.headers["retry-after"]) >= 1
        for waiting in asked:
            waiting.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await running[0].close()
        patient = client.with_options(max_retries=5)  # comes by itself when it was told to
        answer = await patient.completions.create(model="trifold", prompt="x", max_tokens=1)
        assert answer.choices


def test_a_content_filter_ends_an_answer_before_the_word_and_refuses_it_in_a_prompt(
    tiers: Processes, client: OpenAI, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"prompt": "def main():", "temperature": 0, "max_tokens": 60}
    text = complete(client, **asked).choices[0].text
    word = next(word for word in re.findall(r"\b[a-z]{4,}\b", text) if word not in text[:20])
    words = tmp_path / "words.toml"
    words.write_text(f'words = ["{word.upper()}"]\n')
    with Service(tiers, tmp_path, "--content-filter", str(words)) as service, service.openai() as filtered:
        choice = complete(filtered, **asked).choices[0]
        assert choice.finish_reason == "content_filter"
        assert choice.text == text[: re.search(rf"\b{word}\b", text).start()]  # type: ignore[union-attr]
        parts = list(complete(filtered, **asked, stream=True))
        assert "".join(part.choices[0].text for part in parts) == choice.text
        assert parts[-1].choices[0].finish_reason == "content_filter"
        with pytest.raises(openai.BadRequestError) as refused:
            complete(filtered, prompt=f"{word}?")
        assert refused.value.code == "content_filter"
        with pytest.raises(openai.BadRequestError, match="logprobs"):
            complete(filtered, prompt="x", logprobs=1)
        service.wait_until_no_session_is_left()


def test_an_edge_that_is_not_there_is_an_error_with_a_status(bundle: Path, tmp_path: Path) -> None:
    class Nowhere:
        edge = "127.0.0.1:1"

        def __init__(self) -> None:
            self.bundle = bundle

    with Service(Nowhere(), tmp_path) as service, service.openai() as client:  # type: ignore[arg-type]
        with pytest.raises(openai.InternalServerError) as lost:
            complete(client, max_tokens=4)
        assert lost.value.status_code == 503
        assert lost.value.code == "unavailable"


def test_a_service_that_stops_lets_answers_end(tiers: Processes, tmp_path: Path) -> None:
    with Service(tiers, tmp_path) as service, service.openai() as client:
        stream = complete(client, max_tokens=300, stream=True)
        text = next(stream).choices[0].text
        with ThreadPoolExecutor(1) as pool:
            ended = pool.submit(service.terminate)
            text += "".join(part.choices[0].text for part in stream)
            assert ended.result() == 0
    with Service(tiers, tmp_path) as service, service.openai() as client:
        assert text == complete(client, max_tokens=300).choices[0].text


def test_with_tls_a_client_needs_the_authority_and_a_key(tiers: Processes, tmp_path: Path) -> None:
    authority = Authority.init(tmp_path / "authority", [HOST])
    cloud, edge, gateway = (enrolled(authority, tmp_path / role, role) for role in ROLES_OF_A_SITE)
    key = add_key(tmp_path / "keys.toml", "alice")
    with Processes(tiers.bundle, tls={"cloud": cloud, "edge": edge}) as private:
        options = ["--tls", str(gateway), "--keys", str(tmp_path / "keys.toml")]
        with Service(private, tmp_path / "journals", *options) as service:
            assert service.url.startswith("https://")
            trusted = DefaultHttpxClient(verify=ssl.create_default_context(cafile=gateway / "authority.pem"))
            with OpenAI(base_url=service.url, api_key=key, max_retries=0, http_client=trusted) as client:
                text = complete(client).choices[0].text
            with service.openai(key) as stranger, pytest.raises(openai.APIConnectionError):
                complete(stranger)
        foreign = enrolled(authority, tmp_path / "foreign", "gateway", "foreign", tenants=("other",))
        options[1] = str(foreign)
        with Service(private, tmp_path / "journals of others", *options) as service:
            trusted = DefaultHttpxClient(verify=ssl.create_default_context(cafile=gateway / "authority.pem"))
            with OpenAI(base_url=service.url, api_key=key, max_retries=0, http_client=trusted) as client:
                with pytest.raises(openai.InternalServerError, match="cannot reach its model") as refused:
                    complete(client)
                assert refused.value.status_code == 503  # the caller's key is not at fault
    with Service(tiers, tmp_path) as plain, plain.openai() as client:
        assert complete(client).choices[0].text == text
