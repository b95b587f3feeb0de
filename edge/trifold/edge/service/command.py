"""`trifold edge serve`."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from trifold.edge.federation.command import join, train
from trifold.edge.service.service import EdgeService
from trifold.edge.service.upstream import Core
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.runtime.shard import Shard
from trifold.shared.runtime.versions import ShardVersions
from trifold.shared.session.server import serve as serve_tier
from trifold.shared.session.startup import load_tier
from trifold.shared.settings import EdgeSettings

edge = typer.Typer(no_args_is_help=True)
edge.command()(train)
edge.command()(join)


@edge.callback()
def _edge() -> None:
    """The edge: the first layers of the model, between devices and the cloud."""


@edge.command()
def serve(
    bundle: Annotated[Path | None, EdgeSettings.flag("bundle")] = None,
    core: Annotated[str | None, EdgeSettings.flag("core")] = None,
    listen: Annotated[str | None, EdgeSettings.flag("listen")] = None,
    timeout: Annotated[float | None, EdgeSettings.flag("timeout")] = None,
    kv_memory: Annotated[str | None, EdgeSettings.flag("kv_memory")] = None,
    streams: Annotated[int | None, EdgeSettings.flag("streams")] = None,
    threads: Annotated[int | None, EdgeSettings.flag("threads")] = None,
    inexact: Annotated[bool | None, EdgeSettings.flag("inexact")] = None,
    lease: Annotated[float | None, EdgeSettings.flag("lease")] = None,
    grace: Annotated[float | None, EdgeSettings.flag("grace")] = None,
    tls: Annotated[Path | None, EdgeSettings.flag("tls")] = None,
    insecure: Annotated[bool | None, EdgeSettings.flag("insecure")] = None,
    log_level: Annotated[str | None, EdgeSettings.flag("log_level")] = None,
    log_format: Annotated[str | None, EdgeSettings.flag("log_format")] = None,
    metrics: Annotated[str | None, EdgeSettings.flag("metrics")] = None,
    traces: Annotated[str | None, EdgeSettings.flag("traces")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML file of settings. [TRIFOLD_CONFIG]")
    ] = None,
) -> None:
    """Serve the edge of a bundle to devices, in front of a core, until SIGTERM."""
    settings = EdgeSettings.load(
        config,
        bundle=bundle,
        core=core,
        listen=listen,
        timeout=timeout,
        kv_memory=kv_memory,
        streams=streams,
        threads=threads,
        inexact=inexact,
        lease=lease,
        grace=grace,
        tls=tls,
        insecure=insecure,
        log_level=log_level,
        log_format=log_format,
        metrics=metrics,
        traces=traces,
    )
    _, shard = load_tier(settings, "edge", partial(Shard.load, threads=settings.threads))
    folder = TierFolder.open(settings.bundle, "edge")
    versions = ShardVersions(shard, folder, threads=settings.threads, inexact=settings.inexact)
    versions.refresh()
    asyncio.run(_serve(settings, versions))


async def _serve(settings: EdgeSettings, versions: ShardVersions) -> None:
    core = Core(settings.core, settings.timeout, tls=settings.tls, insecure=settings.insecure)
    service = EdgeService(
        versions,
        core,
        memory=settings.kv_memory,
        streams=settings.streams,
        lease=settings.lease,
    )
    await serve_tier(
        service,
        settings.listen,
        grace=settings.grace,
        tls=settings.tls,
        insecure=settings.insecure,
        metrics=settings.metrics,
    )
