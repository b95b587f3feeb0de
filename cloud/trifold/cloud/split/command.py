"""`trifold split`: a checkpoint becomes a bundle."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from trifold.cloud.split import figures
from trifold.cloud.split import split as splitter
from trifold.cloud.split.cuts import parse_cuts, parse_ratio
from trifold.cloud.split.plan import Measure, plan
from trifold.shared.bundle.manifest import TIERS, CodecName, FileEntry, Manifest, Quantization
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
    train: Annotated[
        bool,
        typer.Option(
            "--train", help="Write each tier's float weights beside its shard, for federated fine-tuning."
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Split a model into a bundle: one folder for each tier, under one serving digest."""
    model = Checkpoint.open(checkpoint)
    planned = plan(
        model.spec,
        ratio=parse_ratio(ratio),
        cuts=parse_cuts(cuts),
        by=by,
        quantization=quant,
        codec=codec,
    )
    began = time.monotonic()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = bar.add_task("splitting", total=None)
    with ExitStack() as shown:

        def advance(done: int, total: int) -> None:
            if not bar.live.is_started:
                shown.enter_context(bar)  # not before: what is refused at once has no use for a bar
            bar.update(task, completed=done, total=total)

        manifest = splitter.split(
            model,
            planned.cuts,
            out,
            quantization=quant,
            codec=codec,
            train=train,
            progress=advance,
        )
    if json:
        typer.echo(manifest.model_dump_json(indent=2))
    else:
        _report(manifest, out, time.monotonic() - began)


def _report(manifest: Manifest, out: Path, seconds: float) -> None:
    serving = manifest.serving
    for tier in TIERS:
        holds = figures.contents(tier, serving.cuts.layers(tier, len(serving.spec.layers)))
        typer.echo(f"{out / tier}: {_size(serving.files[tier])}, {holds}")
        if tier in manifest.training:
            typer.echo(f"  for training: {_size(manifest.training[tier])}")
    typer.echo(f"serving digest {manifest.serving_digest[:12]} in {seconds:.1f} s")


def _size(files: Mapping[str, FileEntry]) -> str:
    return figures.size(sum(entry.size for entry in files.values()))
