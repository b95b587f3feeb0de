"""`trifold bench`: how fast this machine is at what Trifold does."""

from __future__ import annotations

import os
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
    with console.status("measuring the machine …"):
        machine, width = _machine(settings, folder.manifest.serving.quantization)
    timed = Core(loaded, folder.manifest, width, context)
    with console.status("timing …"):
        decode = timed.decode([count for count in SESSIONS if count <= sessions])
        prefill = timed.prefill(prompt)
    report = Report(loaded.fingerprint, context, machine, decode, prefill)
    typer.echo(report.json() if as_json else report.text())


def _machine(settings: CloudSettings, quantization: Quantization) -> tuple[Machine | None, float | None]:
    """What it reaches with this engine, as far as that can be measured; bytes of a weight, for Core."""
    if settings.engine == "onnxruntime":
        cores = settings.threads or len(os.sched_getaffinity(0))
        return Machine(read_rate(cores), matrix_rate(settings.threads, _BITS[quantization])), None
    if settings.engine == "torch":
        from trifold.cloud.core.engines.torch import rates

        read = rates.read_rate(settings.device)
        return Machine(read, rates.matrix_rate(settings.device, settings.weights)), rates.WIDTHS[
            settings.weights
        ]
    return None, None
