"""Stalled consumers: 100 callers that ask for much and read nothing, and what that costs each process.

The memory is what is anonymous (RssAnon) before and after, for each consumer; the caches that
the tiers have reserved for the sessions are shown beside it, as a caller who reads has those, too.
"""

from __future__ import annotations

import asyncio
import json
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

import grpc.aio

from tests.bench.nano import held_out, split_nano
from tests.memory import anonymous
from tests.processes import Processes
from tests.site import Service
from tests.wire import Peer
from trifold.device import AsyncClient
from trifold.proto.v1 import generate_pb2 as pb
from trifold.proto.v1.generate_pb2_grpc import GenerateServiceStub
from trifold.shared.session.channel import CHANNEL_OPTIONS

CONSUMERS: Final = 100
CAPACITY: Final = 1000
SETTLED: Final = 1.0
"""Seconds between looks at the memory, which has settled when it stays the same: nobody gets more by then."""

Consumers = Callable[[int], AbstractAsyncContextManager[None]]


def main() -> None:
    asyncio.run(_main())


async def _main() -> None:
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder:
        bundle = split_nano(Path(folder) / "nano")
        print(f"{CONSUMERS} consumers; KiB for each in every process, and the caches reserved for each\n")
        print("| who reads nothing | device serve | edge | core | cache at the edge | at the core |")
        print("|---|---|---|---|---|---|")
        options = ("--threads", "1", "--streams", str(2 * CONSUMERS))
        for face in ("a device, at the edge", "a client, over gRPC", "a client, over HTTP"):
            with (
                Processes(bundle, *options) as tiers,
                Service(tiers, Path(folder) / face, *options, "--timeout", "600") as service,
            ):
                consumers: dict[str, Consumers] = {
                    "a device, at the edge": lambda count: _devices(tiers, count),
                    "a client, over gRPC": lambda count: _over_grpc(service.address, count),
                    "a client, over HTTP": lambda count: _over_http(service.url, count),
                }
                await _row(face, consumers[face], tiers, service)


async def _row(face: str, consumers: Consumers, tiers: Processes, service: Service) -> None:
    pids = (service.pid, tiers.pid("edge"), tiers.pid("cloud"))
    async with consumers(5):
        await _settled(pids)
    before = await _settled(pids)
    async with consumers(CONSUMERS):
        await asyncio.sleep(SETTLED)  # until they have begun
        async with (
            Peer.at(tiers.edge, "EdgeService") as edge,
            Peer.at(tiers.core, "CoreService") as core,
        ):
            caches = [await edge.describe(), await core.describe()]
        after = await _settled(pids)
    grown = [(late - early) / CONSUMERS / 1024 for early, late in zip(before, after, strict=True)]
    reserved = [tier.kv_bytes / max(1, tier.sessions) / 1024 for tier in caches]
    print(f"| {face} | {' | '.join(f'{value:,.0f}' for value in [*grown, *reserved])} |", flush=True)


async def _settled(pids: tuple[int, ...]) -> list[int]:
    """Bytes of each, when they have not changed for a while."""
    before = [0] * len(pids)
    while (now := [anonymous(pid) for pid in pids]) != before:
        before = now
        await asyncio.sleep(SETTLED)
    return now


@asynccontextmanager
async def _devices(tiers: Processes, count: int) -> AsyncIterator[None]:
    """Devices that send as many rows as they may, ask for all of them, and take none."""
    async with AsyncClient(tiers.edge, bundle=tiers.bundle, threads=1) as client, AsyncExitStack() as stack:
        limits = await client.describe()
        talks = []
        for _ in range(count):
            peer = await stack.enter_async_context(Peer.apart(tiers.edge, "EdgeService"))
            talk = peer.call()
            talks.append(talk)
            opened = await talk.open(limits.serving_digest, capacity=CAPACITY)
            rows = min(opened.max_rows, CAPACITY // opened.steps_in_flight)
            for step in range(opened.steps_in_flight):
                await talk.send_tokens([7] * rows, step * rows)
        try:
            yield
        finally:
            for talk in talks:
                await talk.drop()


@asynccontextmanager
async def _over_grpc(address: str, count: int) -> AsyncIterator[None]:
    asked = pb.GenerateRequest(text=held_out()[:200], max_tokens=CAPACITY // 2, logprobs=20)
    options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, options) for _ in range(count)]
    calls: list[grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]] = []
    try:
        for channel in channels:
            call = GenerateServiceStub(channel).Generate(asked)
            await call.initial_metadata()
            calls.append(call)
        yield
    finally:
        for call in calls:
            call.cancel()
        for channel in channels:
            await channel.close()


@asynccontextmanager
async def _over_http(url: str, count: int) -> AsyncIterator[None]:
    host, _, port = url.split("/")[2].partition(":")
    body = json.dumps(
        {
            "model": "trifold",
            "messages": [{"role": "user", "content": held_out()[:200]}],
            "max_tokens": CAPACITY // 2,
            "logprobs": True,
            "top_logprobs": 20,
            "stream": True,
        }
    )
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    sockets = []
    for _ in range(count):
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect((host, int(port)))
        one.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        sockets.append(one)
    try:
        yield
    finally:
        for one in sockets:
            one.close()
