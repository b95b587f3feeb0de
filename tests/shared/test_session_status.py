from __future__ import annotations

import logging

import grpc.aio
import pytest

from trifold.shared.errors import ERRORS, MessageTooLarge, Overloaded, TrifoldError, Unavailable
from trifold.shared.session.channel import connect
from trifold.shared.session.status import abort, from_rpc_error, public


async def call(channel: grpc.aio.Channel) -> grpc.aio.AioRpcError:
    """What a call of a method that fails raises."""
    method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test/Fail")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await method(b"", timeout=10)
    return caught.value


async def over_the_wire(error: TrifoldError) -> TrifoldError:
    """The error as the other end of a real call gets it."""

    async def fail(_: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        await abort(context, error)

    server = grpc.aio.server()
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(fail)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test", {"Fail": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with connect(f"127.0.0.1:{port}") as channel:
            received = await call(channel)
            assert received.code() is error.grpc_status
            return from_rpc_error(received)
    finally:
        await server.stop(None)


@pytest.mark.parametrize("kind", ERRORS.values(), ids=ERRORS.keys())
async def test_every_error_comes_out_of_the_wire_as_it_went_in(kind: type[TrifoldError]) -> None:
    received = await over_the_wire(kind("what, where, and what to do: 100 % größer"))
    assert type(received) is kind
    assert received.message == "what, where, and what to do: 100 % größer"
    assert received.retry_after is None


async def test_the_time_to_wait_travels_with_an_error() -> None:
    assert (await over_the_wire(Overloaded("full", retry_after=1.25))).retry_after == 1.25


async def test_a_message_too_long_for_a_header_is_cut_and_arrives() -> None:
    received = await over_the_wire(Unavailable("ö" * 5000))
    assert received.message.startswith("ö" * 400)


async def test_nobody_listening_is_unavailable_and_names_the_peer(unused_tcp_port: int) -> None:
    async with connect(f"127.0.0.1:{unused_tcp_port}") as channel:
        error = from_rpc_error(await call(channel), "the core")
    assert type(error) is Unavailable
    assert error.message.startswith("the core: ")


def test_errors_that_grpc_makes_up_are_translated() -> None:
    def translated(code: grpc.StatusCode) -> type[TrifoldError]:
        return type(from_rpc_error(grpc.aio.AioRpcError(code, None, None, "")))

    assert translated(grpc.StatusCode.CANCELLED) is Unavailable
    assert translated(grpc.StatusCode.RESOURCE_EXHAUSTED) is MessageTooLarge
    assert translated(grpc.StatusCode.DATA_LOSS) is TrifoldError


def test_details_that_are_not_ours_are_no_reason() -> None:
    trailer = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff not protobuf"))
    error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, None, trailer, "gone")
    assert type(from_rpc_error(error)) is Unavailable


def test_a_foreign_exception_is_told_as_a_number_that_the_log_explains(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR):
        told = public(ValueError("password in plain text"))
    assert type(told) is TrifoldError
    assert "password" not in told.message
    number = told.message.split()[2].rstrip(":")
    assert number in caplog.text
    assert "password" in caplog.text
