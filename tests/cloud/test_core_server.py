from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.cloud.cores import codec_of, digest_of, expected, opened, settled, some_rows
from tests.tiers import RunningCore, engine, running_core
from tests.wire import Peer, decoded
from trifold.shared.errors import (
    ConfigError,
    InvalidRequest,
    Unavailable,
)
from trifold.shared.session.channel import connect


async def test_describe_tells_what_the_tier_is_and_how_busy(core: RunningCore, peer: Peer) -> None:
    talk = await opened(core, peer)
    told = await peer.describe()
    assert told.serving_digest == digest_of(core)
    assert (told.max_positions, told.max_rows, told.sessions, told.draining) == (256, 512, 1, False)
    assert told.kv_bytes == engine(core.bundle).cache_bytes(64) <= told.kv_bytes_limit
    assert [tier.tier for tier in told.tiers] == ["cloud"]
    await talk.close()
    with pytest.raises(InvalidRequest, match="not a DescribeRequest"):
        await peer.describe(b"\xff")


async def health(address: str) -> int:
    async with connect(address) as channel:
        request = health_pb2.HealthCheckRequest(service="trifold.proto.v1.CoreService")
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=20)
        status: int = answer.status
        return status


async def test_health_and_reflection_are_served(core: RunningCore) -> None:
    assert await health(core.address) == health_pb2.HealthCheckResponse.SERVING
    async with connect(core.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        async for response in stub.ServerReflectionInfo(requests, timeout=20):
            names = {service.name for service in response.list_services_response.service}
            assert {"trifold.proto.v1.CoreService", "grpc.health.v1.Health"} <= names


async def test_draining_admits_nobody_and_lets_those_end_who_run(core: RunningCore, peer: Peer) -> None:
    rows, codec = some_rows(core), codec_of(core)
    talk = await opened(core, peer, held=4)
    draining = asyncio.create_task(core.server.drain(20))
    await settled(lambda: core.service.table.draining)
    assert await health(core.address) == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(Unavailable, match="shutting down"):
        await opened(core, peer)
    await talk.send_rows(codec, rows[4:], 4)
    assert np.array_equal(decoded(codec, await talk.result()), expected(core, rows)[4:])
    assert not draining.done()
    await talk.close()
    await draining


async def test_who_still_runs_when_the_grace_is_over_is_told_to_resume(core: RunningCore, peer: Peer) -> None:
    talk = await opened(core, peer, held=4)
    await core.server.drain(0.05)
    await core.server.stop()
    error = await talk.end()
    assert type(error) is Unavailable
    assert "resume" in error.message


async def test_a_session_that_failed_leaves_nothing_in_memory(core: RunningCore, peer: Peer) -> None:
    talk = await opened(core, peer, held=4)
    [session] = core.service.table._sessions.values()
    assert session.cache is not None
    cache = weakref.ref(session.cache)
    del session
    await talk.say(b"\xff")
    assert type(await talk.end()) is InvalidRequest

    def gone() -> bool:
        gc.collect()
        return cache() is None

    await settled(gone)


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.org:0"])
async def test_services_listen_on_loopback_only(bundle: Path, listen: str) -> None:
    with pytest.raises(ConfigError, match="without TLS"):
        async with running_core(bundle, listen=listen):
            pass


async def test_a_port_that_is_taken_is_refused(core: RunningCore, bundle: Path) -> None:
    with pytest.raises(ConfigError, match="is another service there"):
        async with running_core(bundle, listen=core.address):
            pass
