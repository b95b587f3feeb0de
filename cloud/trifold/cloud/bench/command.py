"""`trifold bench`: how fast this machine is at what Trifold does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from trifold.cloud.bench.core import Core
from trifold.cloud.bench.machine import Machine, matrix_rate, read_rate
from trifold.cloud.bench.report import Report
from trifold.cloud.core.engines.registry import loader
from trifold.cloud.split.graph.quantize import Bits
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import Quantization
from trifold.shared.errors import ConfigError
from trifold.shared.settings import CloudSettings

bench = typer.Typer(no_args_is_help=True)

SESSIONS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)

_BITS: Final[dict[Quantization, Bits | None]] = {"int8": 8, "int4": 4, "none": None}


@bench.callback()
def _bench() -> None:
    """How fast this machine is."""


@bench.command()
def core(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle, or of the cloud's part of it.")],
    sessions: Annotated[int, typer.Option(min=1, max=SESSIONS[-1], help="At most so many together.")] = 256,
    context: Annotated[int, typer.Option(min=1, help="Positions that each of them holds.")] = 256,
    prompt: Annotated[int, typer.Option(min=1, help="Rows of the prompt.")] = 512,
    threads: Annotated[int, typer.Option(min=0, help="Threads of the engine; 0 is one per core.")] = 0,
    engine: Annotated[str | None, CloudSettings.flag("engine")] = None,
    device: Annotated[str | None, CloudSettings.flag("device")] = None,
    weights: Annotated[str | None, CloudSettings.flag("weights")] = None,
    kv_memory: Annotated[str | None, CloudSettings.flag("kv_memory")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Time the core's engine: a row of 1 to 256 sessions at a time, and a prompt, without a network.

    Each kind comes in turn, several times over, and the median counts. For onnxruntime and torch it tells
    shares, too: of what is read from memory here at most, and computed in products of the weights' format.
    """
    folder = TierFolder.open(bundle, "cloud")
    positions = folder.manifest.serving.spec.max_positions
    if max(context + 1, prompt) > positions:
        raise ConfigError(f"the model has {positions} positions: ask for less --context or --prompt")
    console = Console(stderr=True)
    with console.status("loading the core …"):
        settings = CloudSettings.load(
            None,
            bundle=bundle,
            engine=engine,
            device=device,
            weights=weights,
            kv_memory=kv_memory,
            threads=threads,
        )
        loaded = loader(settings)(folder, progress=lambda done, total: None)
    measure, width = _measure(settings, folder.manifest.serving.quantization)
    with console.status("measuring the machine …"):
        before = measure and measure()
    timed = Core(loaded, folder.manifest, width, context)
    with console.status("timing …"):
        decode = timed.decode([count for count in SESSIONS if count <= sessions])
        prefill = timed.prefill(prompt)
    with console.status("measuring the machine again …"):
        machine = before.best(measure()) if before and measure else None
    report = Report(loaded.fingerprint, context, machine, decode, prefill)
    typer.echo(report.json() if as_json else report.text())


def _measure(
    settings: CloudSettings, quantization: Quantization
) -> tuple[Callable[[], Machine] | None, float | None]:
    """What measures the machine with this engine, where that can be done; bytes of a weight, for Core."""
    if settings.engine == "onnxruntime":
        cores = settings.threads or len(os.sched_getaffinity(0))
        bits = _BITS[quantization]
        return lambda: Machine(read_rate(cores), matrix_rate(settings.threads, bits)), None
    if settings.engine == "torch":
        from trifold.cloud.core.engines.torch import rates

        device, weights = settings.device, settings.weights
        return lambda: Machine(rates.read_rate(device), rates.matrix_rate(device, weights)), rates.WIDTHS[
            weights
        ]
    return None, None
