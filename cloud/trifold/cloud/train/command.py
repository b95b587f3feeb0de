"""`trifold cloud train`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Final

import typer

from trifold.shared.bundle.folder import TierFolder
from trifold.shared.cli.logs import log_service
from trifold.shared.errors import ConfigError
from trifold.shared.session.ports import check_free
from trifold.shared.session.server import serve
from trifold.shared.settings import CloudTrainSettings

_GRACE: Final = 10.0
"""Seconds for the batches that are computed when the process is to stop; sites come back after any other."""


def train(
    bundle: Annotated[Path | None, CloudTrainSettings.flag("bundle")] = None,
    listen: Annotated[str | None, CloudTrainSettings.flag("listen")] = None,
    activation_memory: Annotated[str | None, CloudTrainSettings.flag("activation_memory")] = None,
    row_memory: Annotated[str | None, CloudTrainSettings.flag("row_memory")] = None,
    device: Annotated[str | None, CloudTrainSettings.flag("device")] = None,
    dtype: Annotated[str | None, CloudTrainSettings.flag("dtype")] = None,
    lease: Annotated[float | None, CloudTrainSettings.flag("lease")] = None,
    threads: Annotated[int | None, CloudTrainSettings.flag("threads")] = None,
    tls: Annotated[Path | None, CloudTrainSettings.flag("tls")] = None,
    insecure: Annotated[bool | None, CloudTrainSettings.flag("insecure")] = None,
    log_level: Annotated[str | None, CloudTrainSettings.flag("log_level")] = None,
    log_format: Annotated[str | None, CloudTrainSettings.flag("log_format")] = None,
    metrics: Annotated[str | None, CloudTrainSettings.flag("metrics")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML file of settings. [TRIFOLD_CONFIG]")
    ] = None,
) -> None:
    """Lend the frozen core of a bundle to sites that train around it, until SIGTERM."""
    settings = CloudTrainSettings.load(
        config,
        bundle=bundle,
        listen=listen,
        activation_memory=activation_memory,
        row_memory=row_memory,
        device=device,
        dtype=dtype,
        lease=lease,
        threads=threads,
        tls=tls,
        insecure=insecure,
        log_level=log_level,
        log_format=log_format,
        metrics=metrics,
    )
    log_service(settings.log_level, settings.log_format)
    check_free(settings.listen, settings.metrics)
    asyncio.run(_serve(settings))


async def _serve(settings: CloudTrainSettings) -> None:
    # torch takes seconds to import, and the other commands of the cloud do without it.
    try:
        import torch

        from trifold.cloud.train import accelerator
        from trifold.cloud.train.service import TrainService
        from trifold.shared.training.shard import TorchShard
        from trifold.shared.training.slices import FloatSlice
    except ModuleNotFoundError as error:
        needed = f"trifold cloud train needs the package {error.name}"
        raise ConfigError(f"{needed}: install Trifold with the extra 'train'") from None
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = accelerator.find(settings.device)
    folder = TierFolder.open(settings.bundle, "cloud")
    floats = FloatSlice.open(folder)
    typer.echo(f"loading the float core of {settings.bundle} …", err=True)
    dtype = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
    service = TrainService(
        TorchShard.load(floats, dtype, device),
        folder.manifest,
        memory=settings.activation_memory,
        row_memory=settings.row_memory,
        lease=settings.lease,
    )
    await serve(
        service,
        settings.listen,
        grace=_GRACE,
        role="training",
        tls=settings.tls,
        insecure=settings.insecure,
        metrics=settings.metrics,
    )
