"""How a service comes up: settings, shard, self-test."""

from __future__ import annotations

from time import perf_counter
from typing import Protocol, TypeVar

import rich.progress
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn

from trifold.shared.bundle.folder import Progress, TierFolder
from trifold.shared.bundle.manifest import Manifest, Tier
from trifold.shared.cli.logs import log_service
from trifold.shared.errors import NotExact
from trifold.shared.session.ports import check_free
from trifold.shared.settings import ServiceSettings
from trifold.shared.telemetry import traces


class Proved(Protocol):
    """A shard or engine after its self-test."""

    exact: bool
    fingerprint: str


P_co = TypeVar("P_co", bound=Proved, covariant=True)


class Load(Protocol[P_co]):
    """Loads and proves what a folder holds; `progress` hears of the weights."""

    def __call__(self, folder: TierFolder, *, progress: Progress) -> P_co: ...


def load_tier(settings: ServiceSettings, tier: Tier, load: Load[P_co]) -> tuple[Manifest, P_co]:
    """The manifest of a tier and what `load` makes of its folder; tells on stderr how far it is.

    Raises ConfigError where it could not listen, DamagedFile, or NotExact when the self-test fails and the
    settings do not allow that.
    """
    log_service(settings.log_level, settings.log_format)
    traces.export(settings.traces, tier, insecure=settings.insecure)
    folder = TierFolder.open(settings.bundle, tier)
    check_free(settings.listen, settings.metrics)
    size = sum(entry.size for entry in folder.files.values())
    _tell(f"loading the {tier} shard of {settings.bundle} ({size / 1e6:.0f} MB) and testing its numerics …")
    began = perf_counter()
    with _bar() as bar:
        task = bar.add_task("weights", total=None)
        shard = load(folder, progress=lambda done, total: bar.update(task, completed=done, total=total))
    if not shard.exact and not settings.inexact:
        raise NotExact(
            f"the self-test of the {tier} shard failed on {shard.fingerprint}: what it gives would depend "
            "on how a prompt is cut. Use other hardware, or give --inexact to run it all the same"
        )
    found = "exact" if shard.exact else "NOT EXACT (--inexact)"
    _tell(f"ready after {perf_counter() - began:.1f} s: {found}, {shard.fingerprint}")
    return folder.manifest, shard


def _bar() -> rich.progress.Progress:
    """For terminals: elsewhere it shows nothing."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return rich.progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _tell(line: str) -> None:
    typer.echo(line, err=True)
