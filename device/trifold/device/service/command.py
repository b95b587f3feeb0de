"""`trifold device serve` and `trifold device key`."""

from __future__ import annotations

import asyncio
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from trifold.device.client.async_client import AsyncClient
from trifold.device.service.content import WordList
from trifold.device.service.desk import Desk
from trifold.device.service.generate import GenerateService
from trifold.device.service.journals import Journals
from trifold.device.service.keys import ApiKeys, add_key
from trifold.shared.cli.logs import log_service
from trifold.shared.errors import ConfigError
from trifold.shared.session.channel import on_loopback
from trifold.shared.session.ports import check_free
from trifold.shared.session.watchdog import watched
from trifold.shared.settings import ServeSettings
from trifold.shared.telemetry import traces as tracing
from trifold.shared.telemetry.exposition import metrics_shown
from trifold.shared.telemetry.metrics import DEVICE

device = typer.Typer(no_args_is_help=True)


@device.callback()
def _device() -> None:
    """The device's part of the model as a service, for clients that hold none."""


@device.command()
def key(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    keys: Annotated[Path, typer.Option("--keys", help="The file of keys; it is made where there is none.")],
) -> None:
    """Make an API key: it is shown once, the file gets its hash."""
    typer.echo(add_key(keys, name))


@device.command()
def serve(
    bundle: Annotated[Path | None, ServeSettings.flag("bundle")] = None,
    edge: Annotated[str | None, ServeSettings.flag("edge")] = None,
    listen: Annotated[str | None, ServeSettings.flag("listen")] = None,
    http: Annotated[str | None, ServeSettings.flag("http")] = None,
    model: Annotated[str | None, ServeSettings.flag("model")] = None,
    keys: Annotated[Path | None, ServeSettings.flag("keys")] = None,
    requests_per_minute: Annotated[int | None, ServeSettings.flag("requests_per_minute")] = None,
    tokens_per_minute: Annotated[int | None, ServeSettings.flag("tokens_per_minute")] = None,
    content_filter: Annotated[Path | None, ServeSettings.flag("content_filter")] = None,
    streams: Annotated[int | None, ServeSettings.flag("streams")] = None,
    max_tokens: Annotated[int | None, ServeSettings.flag("max_tokens")] = None,
    journals: Annotated[Path | None, ServeSettings.flag("journals")] = None,
    timeout: Annotated[float | None, ServeSettings.flag("timeout")] = None,
    tls: Annotated[Path | None, ServeSettings.flag("tls")] = None,
    insecure: Annotated[bool | None, ServeSettings.flag("insecure")] = None,
    threads: Annotated[int | None, ServeSettings.flag("threads")] = None,
    inexact: Annotated[bool | None, ServeSettings.flag("inexact")] = None,
    grace: Annotated[float | None, ServeSettings.flag("grace")] = None,
    log_level: Annotated[str | None, ServeSettings.flag("log_level")] = None,
    log_format: Annotated[str | None, ServeSettings.flag("log_format")] = None,
    metrics: Annotated[str | None, ServeSettings.flag("metrics")] = None,
    traces: Annotated[str | None, ServeSettings.flag("traces")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML file of settings. [TRIFOLD_CONFIG]")
    ] = None,
) -> None:
    """Serve any client of the site, over gRPC and with OpenAI's API over HTTP, until SIGTERM."""
    settings = ServeSettings.load(
        config,
        bundle=bundle,
        edge=edge,
        listen=listen,
        http=http,
        model=model,
        keys=keys,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        content_filter=content_filter,
        streams=streams,
        max_tokens=max_tokens,
        journals=journals,
        timeout=timeout,
        tls=tls,
        insecure=insecure,
        threads=threads,
        inexact=inexact,
        grace=grace,
        log_level=log_level,
        log_format=log_format,
        metrics=metrics,
        traces=traces,
    )
    log_service(settings.log_level, settings.log_format)
    tracing.export(settings.traces, "device", insecure=settings.insecure)
    asyncio.run(_serve(settings))


async def _serve(settings: ServeSettings) -> None:
    try:
        from trifold.device.gateway.app import gateway
        from trifold.device.service.server import SiteServer, until_signal
    except ModuleNotFoundError as error:
        needed = f"trifold device serve needs the package {error.name}"
        raise ConfigError(f"{needed}: install Trifold with the extra 'gateway'") from None
    if not (settings.keys or settings.insecure or on_loopback(settings.http)):
        raise ConfigError(f"{settings.http} is not on loopback: say who may call with --keys, or --insecure")
    check_free(settings.listen, settings.http, settings.metrics)
    keys = ApiKeys(
        settings.keys,
        requests_per_minute=settings.requests_per_minute,
        tokens_per_minute=settings.tokens_per_minute,
    )
    content_filter = WordList.read(settings.content_filter) if settings.content_filter else None
    journals = Journals(settings.journals)
    client = AsyncClient(
        settings.edge,
        bundle=settings.bundle,
        timeout=settings.timeout,
        threads=settings.threads,
        inexact=settings.inexact,
        tls=settings.tls,
        insecure=settings.insecure,
    )
    async with client:
        desk = Desk(
            client,
            keys,
            content_filter,
            streams=settings.streams,
            timeout=settings.timeout,
            max_tokens=settings.max_tokens,
        )
        server = SiteServer(
            GenerateService(desk, journals),
            gateway(desk, settings.model),
            listen=settings.listen,
            http=settings.http,
            tls=settings.tls,
            insecure=settings.insecure,
        )
        await server.start()
        typer.echo(f"OpenAI's API is at {server.url}/v1", err=True)
        ready = f"trifold device ready on {server.address} with bundle {client.digest[:12]}"
        with metrics_shown(settings.metrics, DEVICE, lambda: chain(desk.readings(), server.readings())):
            async with watched():
                print(ready, flush=True)
                await until_signal(server, settings.grace)
    tracing.flush()
