"""Real tiers in this process: shards of a bundle behind real servers on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from trifold.cloud.core.engines.onnxruntime.engine import OnnxRuntimeEngine
from trifold.cloud.core.service import CoreService
from trifold.edge.service.service import EdgeService
from trifold.edge.service.upstream import Core
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import Tier
from trifold.shared.runtime.shard import Shard
from trifold.shared.runtime.versions import ShardVersions
from trifold.shared.session.server import TierServer

MEMORY = 1 << 30


@cache
def shard(bundle: Path, tier: Tier) -> Shard:
    """The proved shard of a tier, loaded once for all tests."""
    return Shard.load(TierFolder.open(bundle, tier), threads=1)


@cache
def engine(bundle: Path) -> OnnxRuntimeEngine:
    """The proved core, loaded once for all tests."""
    return OnnxRuntimeEngine.load(TierFolder.open(bundle, "cloud"), threads=1)


@dataclass
class RunningCore:
    bundle: Path
    service: CoreService
    server: TierServer
    address: str


@dataclass
class RunningEdge:
    service: EdgeService
    server: TierServer
    address: str


@asynccontextmanager
async def running_core(
    bundle: Path,
    *,
    listen: str = "127.0.0.1:0",
    memory: int = MEMORY,
    streams: int = 64,
    lease: float = 30.0,
    tls: Path | None = None,
    prefix_memory: int = 0,
) -> AsyncIterator[RunningCore]:
    manifest = TierFolder.open(bundle, "cloud").manifest
    service = CoreService(
        engine(bundle), manifest, memory=memory, streams=streams, lease=lease, prefix_memory=prefix_memory
    )
    server = TierServer(service)
    await server.start(listen, tls=tls)
    try:
        yield RunningCore(bundle, service, server, server.address)
    finally:
        await server.stop()


@asynccontextmanager
async def running_edge(
    bundle: Path,
    core: str,
    *,
    memory: int = MEMORY,
    streams: int = 64,
    lease: float = 30.0,
    patience: float = 20.0,
    tls: Path | None = None,
) -> AsyncIterator[RunningEdge]:
    versions = ShardVersions(shard(bundle, "edge"), TierFolder.open(bundle, "edge"), threads=1)
    upstream = Core(core, timeout=patience, tls=tls)
    service = EdgeService(versions, upstream, memory=memory, streams=streams, lease=lease)
    server = TierServer(service)
    await server.start("127.0.0.1:0", tls=tls)
    try:
        yield RunningEdge(service, server, server.address)
    finally:
        await server.stop()
