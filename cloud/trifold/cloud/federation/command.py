"""`trifold federate run | resume | status`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from trifold.cloud.federation.folder import RunFolder
from trifold.cloud.federation.metrics import read
from trifold.cloud.federation.page import FILE as PAGE
from trifold.cloud.federation.page import page
from trifold.cloud.federation.settings import RunSettings
from trifold.cloud.federation.submit import Simulation, SuperLink, check, submit
from trifold.cloud.federation.table import Progress
from trifold.shared import durable
from trifold.shared.errors import ConfigError, TrifoldError, Unavailable

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
    # All that can be wrong comes before the folder: it would stand in the way of the next attempt.
    simulation = _simulation(simulate, trainer)
    check(app)
    _check_strategy(told)
    link.wait()
    created = RunFolder.create(folder, told)
    _follow(created, submit(created, link, app, simulation))


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
    opened, link = RunFolder.open(folder), SuperLink(superlink, root_certificates)
    if opened.at_work():
        raise TrifoldError(f"the run is at work: follow it with `trifold federate status {folder}`")
    simulation = _simulation(simulate, trainer)
    check(app)
    link.wait()
    _follow(opened, submit(opened, link, app, simulation))


@federate.command()
def status(folder: Folder) -> None:
    """Show what a run has done so far, and write its page."""
    opened = RunFolder.open(folder)
    # Before the log is read: it is complete when the lock is gone.
    at_work = opened.at_work()
    Console().print(Progress.of(read(folder)).render(opened.settings.rounds, at_work=at_work))
    _write_page(opened)


def _simulation(nodes: int, trainer: Path | None) -> Simulation | None:
    """Raises ConfigError when one is given without the other."""
    if nodes > 0 and trainer:
        return Simulation(nodes, trainer)
    if nodes or trainer:
        raise ConfigError("a simulation needs both --simulate NODES and --trainer SOCKET")
    return None


def _check_strategy(told: RunSettings) -> None:
    """Raises ConfigError for options that the strategy does not have."""
    try:
        from trifold.cloud.federation.strategy import Aggregator
    except ModuleNotFoundError as error:
        needed = f"trifold federate needs the package {error.name}"
        raise ConfigError(f"{needed}: install Trifold with the extra 'federated'") from None
    Aggregator(told)


def _write_page(folder: RunFolder) -> None:
    durable.write(folder.path / PAGE, page(folder.path.name, read(folder.path)).encode())


def _follow(folder: RunFolder, flower_run: int) -> None:
    """A live table until the run has ended. Raises TrifoldError when it has failed.

    Ctrl-C ends the table and not the run.
    """
    console = Console()
    try:
        progress = _watch(folder, flower_run, console)
    except KeyboardInterrupt:
        console.print(f"The run goes on: see `trifold federate status {folder.path}`")
        raise
    finally:
        _write_page(folder)
        if not console.is_terminal:
            console.line()
    if progress.failed:
        raise TrifoldError(f"{progress.failed} (resume with `trifold federate resume {folder.path}`)")
    console.print(f"The adapter is {folder.path / 'adapter.safetensors'}, the curves {folder.path / PAGE}")


def _watch(folder: RunFolder, flower_run: int, console: Console) -> Progress:
    """The table, until the run has ended or failed. Raises Unavailable when it does not go on."""
    since = time.monotonic()
    begun = False
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            # Before the log is read: it is complete when the lock is gone.
            lost = begun and not folder.at_work()
            events = list(read(folder.path))
            progress = Progress.of(events)
            begun = any(event.get("flower_run") == flower_run for event in events)
            live.update(progress.render(folder.settings.rounds, at_work=not lost), refresh=True)
            if begun and (progress.ended or progress.failed):
                return progress
            if lost:
                raise Unavailable(
                    f"the ServerApp was lost: go on with `trifold federate resume {folder.path}`"
                )
            if not begun and time.monotonic() - since > _PATIENCE:
                raise Unavailable(
                    f"Flower has not started run {flower_run} yet: is there a flower-superexec? Where there "
                    f"is one, the run begins: see `trifold federate status {folder.path}`"
                )
            time.sleep(_PAUSE)
