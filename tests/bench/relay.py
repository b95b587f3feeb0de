"""Bare gRPC between three processes: what the links of a token cost when nothing else is done.

`python -m tests.bench.relay SECONDS core` and `… edge PORT` serve; each prints its port. A message of a
token's size goes from here through the edge to the core and back, by the options that Trifold uses. Where a
tier would compute, it spins, altogether for SECONDS: links that rest between messages are slower.
"""

from __future__ import annotations

import trifold.shared.grpc_engine  # noqa: F401  # isort: skip - before grpc

import asyncio
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any, Final

import grpc.aio

from trifold.shared.session.channel import SERVER_OPTIONS, connect

MESSAGES: Final = 600
MESSAGE: Final = bytes(400)
_WARM: Final = 100
_SHARE: Final = {"device": 0.2, "edge": 0.3, "core": 0.5}
"""Of the time that a token is computed for, spent in each tier."""


def measure(compute: float) -> float:
    """Median milliseconds of a round trip through both links, less the tiers' part of `compute` seconds."""
    with ExitStack() as stack:
        core = _start(stack, compute, "core")
        edge = _start(stack, compute, "edge", core)
        return asyncio.run(_device(compute, edge))


async def _device(compute: float, port: str) -> float:
    async with connect(f"127.0.0.1:{port}") as channel:
        call: Any = channel.stream_stream("/Relay/Session")()
        times = []
        for _ in range(MESSAGES):
            _spin(compute * _SHARE["device"])
            began = time.perf_counter()
            await call.write(MESSAGE)
            await call.read()
            times.append(time.perf_counter() - began)
        await call.done_writing()
        await call.read()
    return 1000 * (statistics.median(times[_WARM:]) - compute * (_SHARE["edge"] + _SHARE["core"]))


class _Core:
    def __init__(self, compute: float) -> None:
        self._compute = compute * _SHARE["core"]

    async def session(self, _: Any, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            _spin(self._compute)
            await context.write(message)


class _Edge:
    def __init__(self, compute: float, core: str) -> None:
        self._compute = compute * _SHARE["edge"]
        self._channel = connect(f"127.0.0.1:{core}")

    async def session(self, _: Any, context: Any) -> None:
        core: Any = self._channel.stream_stream("/Relay/Session")()
        while (message := await context.read()) is not grpc.aio.EOF:
            _spin(self._compute)
            await core.write(message)
            await context.write(await core.read())


async def _serve(handler: Any) -> None:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    methods: Any = {"Session": grpc.stream_stream_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("Relay", methods)])
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


def _start(stack: ExitStack, compute: float, *tier: str) -> str:
    """Starts a tier, which ends with `stack`, and returns its port."""
    command = [sys.executable, "-m", "tests.bench.relay", str(compute), *tier]
    process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    stack.callback(process.kill)
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _spin(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


async def _main(compute: str, role: str, *core: str) -> None:
    tier = _Core(float(compute)) if role == "core" else _Edge(float(compute), *core)
    await _serve(tier.session)


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
