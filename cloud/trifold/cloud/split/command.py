"""`trifold split`: a checkpoint becomes a bundle."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from trifold.cloud.split import split as splitter
from trifold.cloud.split.command_plan import parse_ratio
from trifold.cloud.split.plan import Measure, plan
from trifold.shared.bundle.manifest import TIERS, CodecName, Cuts, Manifest, Quantization
from trifold.shared.errors import InvalidRequest
from trifold.shared.model.checkpoint import Checkpoint


def split(
    checkpoint: Annotated[Path, typer.Argument(help="Hugging Face folder with safetensors.")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle; an older bundle there is replaced.")],
    quant: Annotated[Quantization, typer.Option(help="How the shards hold matrices.")] = "int8",
    codec: Annotated[CodecName, typer.Option(help="How rows cross links.")] = "int8",
    ratio: Annotated[str, typer.Option(help="Shares of cloud, edge and device.")] = "70/20/10",
    by: Annotated[Measure, typer.Option(help="What the ratio is of.")] = "params",
    cuts: Annotated[
        str, typer.Option(help="Cut before these two layers, such as 2/10, whatever the ratio.")
    ] = "",
    train: Annotated[bool, typer.Option("--train", help="Write each tier's float weights too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Split a model into a bundle: one folder for each tier, under one serving digest."""
    model = Checkpoint.open(checkpoint)
    if cuts:
        where = _cuts(cuts)
    else:
        where = plan(model.spec, ratio=parse_ratio(ratio), by=by, quantization=quant, codec=codec).cuts
    console = Console(stderr=True)
    began = time.monotonic()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as bar:
        task = bar.add_task("splitting", total=None)
        manifest = splitter.split(
            model,
            where,
            out,
            quantization=quant,
            codec=codec,
            train=train,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if json:
        typer.echo(manifest.model_dump_json(indent=2))
    else:
        _report(manifest, out, time.monotonic() - began)


def _cuts(text: str) -> Cuts:
    """ "2/10" as cuts. Raises InvalidRequest for anything else."""
    try:
        edge, cloud = (int(part) for part in text.split("/"))
        return Cuts(edge=edge, cloud=cloud)
    except ValueError as error:
        raise InvalidRequest(f"--cuts {text!r} is not two layer numbers such as 2/10") from error


def _report(manifest: Manifest, out: Path, seconds: float) -> None:
    serving = manifest.serving
    for tier in TIERS:
        span = serving.cuts.layers(tier, len(serving.spec.layers))
        size = sum(entry.size for entry in serving.files[tier].values())
        layers = f"layers {span[0]} to {span[-1]}" if span else "no layers"
        typer.echo(f"{out / tier}: {size / 1e6:.1f} MB, {layers}")
    typer.echo(f"serving digest {manifest.serving_digest} in {seconds:.1f} s")
