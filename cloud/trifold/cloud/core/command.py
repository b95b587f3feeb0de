"""`trifold cloud serve`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from trifold.cloud.core.engines.engine import Engine
from trifold.cloud.core.engines.registry import loader
from trifold.cloud.core.service import CoreService
from trifold.cloud.train.command import train
from trifold.shared.bundle.manifest import Manifest
from trifold.shared.session.server import serve as serve_tier
from trifold.shared.session.startup import load_tier
from trifold.shared.settings import CloudSettings

cloud = typer.Typer(no_args_is_help=True)
cloud.command()(train)


@cloud.callback()
def _cloud() -> None:
    """The cloud: the core of the model."""


@cloud.command()
def serve(
    bundle: Annotated[Path | None, CloudSettings.flag("bundle")] = None,
    listen: Annotated[str | None, CloudSettings.flag("listen")] = None,
    kv_memory: Annotated[str | None, CloudSettings.flag("kv_memory")] = None,
    streams: Annotated[int | None, CloudSettings.flag("streams")] = None,
    engine: Annotated[str | None, CloudSettings.flag("engine")] = None,
    device: Annotated[str | None, CloudSettings.flag("device")] = None,
    weights: Annotated[str | None, CloudSettings.flag("weights")] = None,
    prefix_memory: Annotated[str | None, CloudSettings.flag("prefix_memory")] = None,
    threads: Annotated[int | None, CloudSettings.flag("threads")] = None,
    inexact: Annotated[bool | None, CloudSettings.flag("inexact")] = None,
    lease: Annotated[float | None, CloudSettings.flag("lease")] = None,
    grace: Annotated[float | None, CloudSettings.flag("grace")] = None,
    tls: Annotated[Path | None, CloudSettings.flag("tls")] = None,
    insecure: Annotated[bool | None, CloudSettings.flag("insecure")] = None,
    log_level: Annotated[str | None, CloudSettings.flag("log_level")] = None,
    log_format: Annotated[str | None, CloudSettings.flag("log_format")] = None,
    metrics: Annotated[str | None, CloudSettings.flag("metrics")] = None,
    traces: Annotated[str | None, CloudSettings.flag("traces")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML file of settings. [TRIFOLD_CONFIG]")
    ] = None,
) -> None:
    """Serve the core of a bundle to edges, until SIGTERM."""
    settings = CloudSettings.load(
        config,
        bundle=bundle,
        listen=listen,
        kv_memory=kv_memory,
        streams=streams,
        engine=engine,
        device=device,
        weights=weights,
        prefix_memory=prefix_memory,
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
    asyncio.run(_serve(settings, *load_tier(settings, "cloud", loader(settings))))


async def _serve(settings: CloudSettings, manifest: Manifest, engine: Engine[Any]) -> None:
    service = CoreService(
        engine,
        manifest,
        memory=settings.kv_memory,
        streams=settings.streams,
        lease=settings.lease,
        prefix_memory=settings.prefix_memory,
    )
    await serve_tier(
        service,
        settings.listen,
        grace=settings.grace,
        tls=settings.tls,
        insecure=settings.insecure,
        metrics=settings.metrics,
    )
