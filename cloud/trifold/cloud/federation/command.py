"""`trifold federate run | resume | status`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from trifold.cloud.federation.folder import RunFolder, running
from trifold.cloud.federation.metrics import read
from trifold.cloud.federation.page import FILE as PAGE
from trifold.cloud.federation.page import page
from trifold.cloud.federation.settings import RunSettings
from trifold.cloud.federation.submit import Simulation, SuperLink, submit
from trifold.cloud.federation.table import Progress
from trifold.shared.errors import ConfigError, TrifoldError, Unavailable
from trifold.shared.federation import durable

_PAUSE = 0.5
_PATIENCE = 90.0
"""Seconds that Flower has to start the ServerApp."""

Folder = Annotated[Path, typer.Argument(help="Folder of the run, on the machine of the SuperLink.")]
Address = Annotated[str, typer.Option("--superlink", help="HOST:PORT of the SuperLink.")]
Certificates = Annotated[
    Path | None, typer.Option(help="Certificate of the authority that signed the SuperLink's.")
]
App = Annotated[Path, typer.Option(help="The Flower app of Trifold.")]
Simulated = Annotated[int, typer.Option(help="Nodes that a SuperLink in simulation mode makes up.")]
Trainer = Annotated[Path | None, typer.Option(help="Unix socket of the trainer that these share.")]

federate = typer.Typer(no_args_is_help=True)


@federate.callback()
def _federate() -> None:
    """Federated fine-tuning: sites train an adapter around the frozen core, and keep their text."""


@federate.command()
def run(
    folder: Folder,
    settings: Annotated[Path | None, typer.Option(help="TOML file of the run's settings.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE over it, such as local.steps=50.")
    ] = None,
    superlink: Address = "127.0.0.1:8000",
    root_certificates: Certificates = None,
    app: App = Path("deploy/flower"),
    simulate: Simulated = 0,
    trainer: Trainer = None,
) -> None:
    """Begin a run, and follow it to its end."""
    told, link = RunSettings.read(settings, assignments or ()), SuperLink(superlink, root_certificates)
    link.wait()
    created = RunFolder.create(folder, told)
    _follow(created, submit(created, link, app, _simulation(simulate, trainer)))


@federate.command()
def resume(
    folder: Folder,
    superlink: Address = "127.0.0.1:8000",
    root_certificates: Certificates = None,
    app: App = Path("deploy/flower"),
    simulate: Simulated = 0,
    trainer: Trainer = None,
) -> None:
    """Go on with a run after its last whole round."""
    opened = RunFolder.open(folder)
    process = Progress.of(read(folder)).process
    if process and running(process):
        raise TrifoldError(f"the run in {folder} is at work in process {process}: follow it with `status`")
    link = SuperLink(superlink, root_certificates)
    link.wait()
    _follow(opened, submit(opened, link, app, _simulation(simulate, trainer)))


@federate.command()
def status(folder: Folder) -> None:
    """Show what a run has done so far."""
    opened = RunFolder.open(folder)
    Console().print(Progress.of(read(folder)).render(opened.settings.rounds))


def _simulation(nodes: int, trainer: Path | None) -> Simulation | None:
    """Raises ConfigError when one is given without the other."""
    if nodes > 0 and trainer:
        return Simulation(nodes, trainer)
    if nodes or trainer:
        raise ConfigError("a simulation needs both --simulate NODES and --trainer SOCKET")
    return None


def _follow(folder: RunFolder, flower_run: int) -> None:
    """A live table until the run has ended. Raises TrifoldError when it has failed.

    Ctrl-C ends the table and not the run.
    """
    since = time.monotonic()
    console = Console()
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            events = list(read(folder.path))
            progress = Progress.of(events)
            live.update(progress.render(folder.settings.rounds), refresh=True)
            begun = any(event.get("flower_run") == flower_run for event in events)
            if begun and (progress.ended or progress.failed):
                break
            if begun and progress.process and not running(progress.process):
                raise Unavailable(
                    f"the ServerApp was lost: go on with `trifold federate resume {folder.path}`"
                )
            if not begun and time.monotonic() - since > _PATIENCE:
                raise Unavailable(f"Flower did not start run {flower_run}: is there a flower-superexec?")
            time.sleep(_PAUSE)
    if not console.is_terminal:
        console.line()
    durable.write(folder.path / PAGE, page(folder.path.name, events).encode())
    if progress.failed:
        raise TrifoldError(f"{progress.failed} (resume with `trifold federate resume {folder.path}`)")
    console.print(f"The adapter is {folder.path / 'adapter.safetensors'}, the curves {folder.path / PAGE}")
