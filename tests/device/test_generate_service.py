from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.processes import Processes
from tests.site import Service, over_a_slow_link
from trifold.device import Client, Message, errors
from trifold.device.service.journals import Journals
from trifold.device.service.keys import Caller, add_key
from trifold.proto.v1 import generate_pb2 as pb
from trifold.proto.v1 import session_pb2
from trifold.proto.v1.generate_pb2_grpc import GenerateServiceStub
from trifold.shared.session.status import from_rpc_error

if TYPE_CHECKING:
    from trifold.proto.v1.generate_pb2_grpc import GenerateServiceAsyncStub

Call = grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]

SAMPLING = session_pb2.Sampling(temperature=0.9, top_k=50, top_p=0.95, seed=5)


@pytest.fixture(scope="module")
def tiers(bundle: Path) -> Iterator[Processes]:
    with Processes(bundle) as running:
        yield running


@pytest.fixture(scope="module")
def service(tiers: Processes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tiers, tmp_path_factory.mktemp("journals")) as running:
        yield running


@pytest.fixture
async def channel(service: Service) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(service.address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> GenerateServiceAsyncStub:
    return GenerateServiceStub(channel)


def once(request_id: str = "", max_tokens: int = 40) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id=request_id, text="Once upon", max_tokens=max_tokens, sampling=SAMPLING
    )


def by_the_sdk(tiers: Processes, max_tokens: int = 40) -> tuple[str, list[int]]:
    with Client(tiers.edge, bundle=tiers.bundle) as sdk:
        chunks = list(
            sdk.generate(
                "Once upon",
                max_tokens=max_tokens,
                temperature=SAMPLING.temperature,
                top_k=50,
                top_p=SAMPLING.top_p,
                seed=5,
            )
        )
    return "".join(chunk.text for chunk in chunks), [token for chunk in chunks for token in chunk.token_ids]


async def whole(call: Call) -> tuple[str, list[int]]:
    responses = [response async for response in call]
    return (
        "".join(response.text for response in responses),
        [token for response in responses for token in response.token_ids],
    )


async def refusal(call: Call) -> errors.TrifoldError:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await whole(call)
    return from_rpc_error(refused.value)


async def test_a_generation_is_that_of_the_sdk(tiers: Processes, stub: GenerateServiceAsyncStub) -> None:
    responses = [response async for response in stub.Generate(once())]
    text, tokens = by_the_sdk(tiers)
    assert "".join(response.text for response in responses) == text
    assert [token for response in responses for token in response.token_ids] == tokens
    last = responses[-1]
    assert last.finish_reason == pb.FINISH_REASON_LENGTH
    assert (last.prompt_tokens, last.completion_tokens) == (9, 40)
    assert {response.finish_reason for response in responses[:-1]} == {pb.FINISH_REASON_UNSPECIFIED}


async def test_a_prompt_may_be_token_ids_or_a_chat(tiers: Processes, stub: GenerateServiceAsyncStub) -> None:
    with Client(tiers.edge, bundle=tiers.bundle) as sdk:
        said = [Message(role="system", content="Be brief."), Message(role="user", content="Hi")]
        prompt = sdk.chat_prompt(said)
        text = "".join(chunk.text for chunk in sdk.generate(prompt, max_tokens=9))
    for system in ("system", "developer"):
        turns = [pb.Turn(role=system, content="Be brief."), pb.Turn(role="user", content="Hi")]
        asked = pb.GenerateRequest(chat=pb.Chat(turns=turns), max_tokens=9)
        assert (await whole(stub.Generate(asked)))[0] == text
    asked = pb.GenerateRequest(tokens=session_pb2.Tokens(ids=prompt), max_tokens=9)
    assert (await whole(stub.Generate(asked)))[0] == text


async def test_stop_strings_and_logprobs_are_as_asked_for(
    tiers: Processes, stub: GenerateServiceAsyncStub
) -> None:
    text, tokens = by_the_sdk(tiers)
    asked = once()
    asked.stop.append(text[6:9])
    asked.logprobs = 2
    responses = [response async for response in stub.Generate(asked)]
    assert "".join(response.text for response in responses) == text[: text.index(text[6:9])]
    assert responses[-1].finish_reason == pb.FINISH_REASON_STOP
    for response, token in zip(responses, tokens, strict=False):
        assert response.logprob.token == token
        assert response.logprob.logprob < 0
        first, second = (top.logprob for top in response.top_logprobs)
        assert first >= max(second, response.logprob.logprob)


async def test_a_cancelled_call_frees_its_session(tiers: Processes, tmp_path: Path) -> None:
    async with (
        over_a_slow_link(tiers, tmp_path) as service,
        grpc.aio.insecure_channel(service.address) as channel,
    ):
        call = GenerateServiceStub(channel).Generate(once(max_tokens=240))
        await anext(aiter(call))
        assert await asyncio.to_thread(service.sessions) == 1
        call.cancel()
        await asyncio.to_thread(service.wait_until_no_session_is_left)


async def test_a_generation_is_gone_on_with_by_its_request_or_by_its_id(
    tiers: Processes, stub: GenerateServiceAsyncStub
) -> None:
    expected = by_the_sdk(tiers, 200)
    for again in (once("request", 200), pb.GenerateRequest(request_id="id")):
        call = stub.Generate(once(again.request_id, 200))
        responses = aiter(call)
        for _ in range(5):
            await anext(responses)
        call.cancel()
        assert await whole(stub.Generate(again)) == expected
    replayed = [response async for response in stub.Generate(once("request", 200))]
    assert [response.replayed for response in replayed] == [True]  # what has ended is told again


async def test_a_generation_survives_the_loss_of_the_service(
    tiers: Processes, service: Service, stub: GenerateServiceAsyncStub
) -> None:
    call = stub.Generate(once("killed", 200))
    responses = aiter(call)
    seen = "".join([(await anext(responses)).text for _ in range(5)])
    service.restart()
    with pytest.raises(grpc.aio.AioRpcError):
        await whole(call)
    text, tokens = await whole(stub.Generate(pb.GenerateRequest(request_id="killed"), wait_for_ready=True))
    assert (text, tokens) == by_the_sdk(tiers, 200)
    assert text.startswith(seen)


async def test_a_later_call_takes_a_generation_over(tiers: Processes, stub: GenerateServiceAsyncStub) -> None:
    first = stub.Generate(once("taken", 240))
    responses = aiter(first)
    await anext(responses)
    assert await whole(stub.Generate(once("taken", 240))) == by_the_sdk(tiers, 240)
    assert isinstance(await refusal(first), errors.StaleEpoch)


async def test_an_id_is_for_one_request(stub: GenerateServiceAsyncStub) -> None:
    await whole(stub.Generate(once("used")))
    assert "another request" in (await refusal(stub.Generate(once("used", 41)))).message
    unknown = await refusal(stub.Generate(pb.GenerateRequest(request_id="never used")))
    assert isinstance(unknown, errors.UnknownSession)


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (pb.GenerateRequest(), errors.InvalidRequest),
        (pb.GenerateRequest(text=""), errors.InvalidRequest),
        (pb.GenerateRequest(text="x", max_tokens=1000), errors.PromptTooLong),
        (pb.GenerateRequest(text="x", logprobs=21), errors.InvalidRequest),
        (pb.GenerateRequest(text="x", stop=[""]), errors.InvalidRequest),
        (pb.GenerateRequest(text="x", sampling=session_pb2.Sampling(temperature=-1)), errors.InvalidRequest),
        (pb.GenerateRequest(chat=pb.Chat(turns=[pb.Turn(role="tool")])), errors.InvalidRequest),
        (pb.GenerateRequest(tokens=session_pb2.Tokens(ids=[2**31])), errors.InvalidRequest),
    ],
)
async def test_what_cannot_be_done_is_refused_with_a_reason(
    stub: GenerateServiceAsyncStub, asked: pb.GenerateRequest, error: type[errors.TrifoldError]
) -> None:
    refused = await refusal(stub.Generate(asked))
    assert type(refused) is error
    assert refused.message


async def test_a_key_is_asked_for_and_generations_belong_to_it(tiers: Processes, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    alice, bob = (add_key(keys, name) for name in ("alice", "bob"))
    with Service(tiers, tmp_path / "journals", "--keys", str(keys)) as service:
        async with grpc.aio.insecure_channel(service.address) as channel:
            stub = GenerateServiceStub(channel)
            assert isinstance(await refusal(stub.Generate(once())), errors.Unauthenticated)
            hers = await whole(stub.Generate(once("mine"), metadata=[("authorization", f"Bearer {alice}")]))
            assert hers == by_the_sdk(tiers)
            asked = pb.GenerateRequest(request_id="mine")
            his = await refusal(stub.Generate(asked, metadata=[("authorization", f"Bearer {bob}")]))
            assert isinstance(his, errors.UnknownSession)


async def test_an_answer_that_takes_too_long_is_given_up(tiers: Processes, tmp_path: Path) -> None:
    with Service(tiers, tmp_path, "--timeout", "0.2") as service:
        async with grpc.aio.insecure_channel(service.address) as channel:
            calls = [GenerateServiceStub(channel).Generate(once(max_tokens=240)) for _ in range(16)]
            refused = [await refusal(call) for call in calls]
        assert {type(error) for error in refused} == {errors.DeadlineExceeded}
        service.wait_until_no_session_is_left()


async def test_an_answer_that_is_cut_short_at_its_first_word_is_given_up_too(
    tiers: Processes, tmp_path: Path
) -> None:
    with Service(tiers, tmp_path, "--timeout", "0.06") as service:
        async with grpc.aio.insecure_channel(service.address) as channel, asyncio.timeout(60):
            for _ in range(6):
                calls = [GenerateServiceStub(channel).Generate(once(max_tokens=240)) for _ in range(16)]
                refused = await asyncio.gather(*map(refusal, calls))
                assert {type(error) for error in refused} == {errors.DeadlineExceeded}


def test_reflection_describes_the_service(service: Service) -> None:
    with grpc.insecure_channel(service.address) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        found = pool.FindServiceByName("trifold.proto.v1.GenerateService")
        assert [method.name for method in found.methods] == ["Generate"]


def test_generations_that_nobody_came_back_for_are_forgotten(tmp_path: Path) -> None:
    caller = Caller("alice", 0, 0)
    path = Journals(tmp_path).path(caller, "old", b"asked")
    path.touch()
    assert Journals(tmp_path).path(caller, "old", None) == path
    hours_ago = time.time() - 7200
    os.utime(path, (hours_ago, hours_ago))
    with pytest.raises(errors.UnknownSession):
        Journals(tmp_path).path(caller, "old", None)
    assert not path.exists()


def test_the_id_of_a_request_that_was_refused_may_be_used_again(tmp_path: Path) -> None:
    journals, caller = Journals(tmp_path), Caller("alice", 0, 0)
    journals.path(caller, "mended", b"wrong")
    path = journals.path(caller, "mended", b"right")
    path.touch()
    with pytest.raises(errors.InvalidRequest, match="another request"):
        journals.path(caller, "mended", b"wrong")
    assert journals.path(caller, "mended", b"right") == path
