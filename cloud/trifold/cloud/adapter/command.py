"""`trifold adapter`: versions of a bundle's weights, and which of them new sessions get."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from trifold.cloud.split import figures
from trifold.shared.bundle.adapter import Adapter, Origin
from trifold.shared.bundle.factors import LoraFactors, metadata
from trifold.shared.bundle.store import BASE, AdapterStore, find, stores
from trifold.shared.bundle.store import promote as promote_version
from trifold.shared.bundle.store import rollback as roll_back
from trifold.shared.errors import ConfigError, DamagedFile, DigestMismatch

Bundle = Annotated[Path, typer.Argument(help="Folder of the bundle, or of its edge's or device's part.")]

adapter = typer.Typer(no_args_is_help=True)


@adapter.callback()
def _adapter() -> None:
    """Adapter versions: what fine-tuning made, brought into running tiers without a restart."""


@adapter.command()
def add(
    bundle: Bundle,
    factors: Annotated[
        Path, typer.Argument(help="LoRA factors, such as the adapter.safetensors of a federated run.")
    ],
) -> None:
    """Build a version from LoRA factors, and print its digest; nobody gets it before it is promoted."""
    try:
        from trifold.cloud.adapter.build import add_version
    except ModuleNotFoundError as error:
        needed = f"trifold adapter add needs the package {error.name}"
        raise ConfigError(f"{needed}: install Trifold with the extra 'cloud'") from None
    began = time.monotonic()
    digest = add_version(bundle, LoraFactors.load(factors), _origin(bundle, factors))
    for store in stores(bundle):
        typer.echo(f"{store.path / digest}: {figures.size(_bytes(store, digest))}", err=True)
    typer.echo(f"built in {time.monotonic() - began:.1f} s", err=True)
    typer.echo(digest)


@adapter.command("list")
def list_(
    bundle: Bundle, as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False
) -> None:
    """Show the versions of a bundle, and which one new sessions get; --json tells where they come from."""
    versions = _listed(bundle)
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in versions], indent=2))
        return
    table = Table(box=None)
    for heading in ("version", "size", "run", "round", "built", "tiers", "in force on"):
        table.add_column(heading)
    for entry in versions:
        table.add_row(
            _short(entry.digest),
            figures.size(entry.bytes) if entry.digest else "",
            entry.run,
            "" if entry.round is None else str(entry.round),
            entry.created[:16].replace("T", " "),
            " ".join(f"{tier} (unusable)" if tier in entry.problems else tier for tier in entry.tiers),
            " ".join(entry.in_force),
        )
    Console().print(table)


@adapter.command()
def promote(
    bundle: Bundle,
    digest: Annotated[
        str,
        typer.Argument(help="The version's digest or how it begins; `base` for the bundle's own weights."),
    ],
) -> None:
    """Give new sessions this version: running services notice within a second or two."""
    chosen = find(bundle, digest)
    promote_version(bundle, chosen)
    _tell(chosen)


@adapter.command()
def rollback(bundle: Bundle) -> None:
    """Take the latest promotion back."""
    _tell(roll_back(bundle))


def _origin(bundle: Path, factors: Path) -> Origin:
    """As the file of the factors tells it."""
    told = metadata(factors)
    number = told.get("round", "")
    return Origin(
        producer=f"trifold {version('trifold')}",
        run=told.get("run", ""),
        round=int(number) if number.isdecimal() else None,
        parent=stores(bundle)[0].current(),
    )


@dataclass
class Listed:
    """A version as `list` shows it: `tiers` that have it, and those of them where it is `in_force`.

    `problems` tell by tier why it cannot be used: a file that is missing or of a wrong size. Contents are
    read by whoever adds or promotes it.
    """

    digest: str
    producer: str = ""
    created: str = ""
    run: str = ""
    round: int | None = None
    parent: str = BASE
    bytes: int = 0
    tiers: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    in_force: list[str] = field(default_factory=list)

    def describe(self, adapter: Adapter) -> None:
        origin = adapter.origin
        self.producer, self.run = origin.producer, origin.run
        self.round, self.parent = origin.round, origin.parent
        self.created = origin.created.isoformat()
        self.bytes += sum(entry.size for entry in adapter.files.values())


def _listed(bundle: Path) -> list[Listed]:
    """The bundle's own weights, then its versions, oldest first."""
    here = stores(bundle)
    listed = {BASE: Listed(BASE, here[0].folder.manifest.producer)}
    for store in here:
        listed[BASE].tiers.append(store.folder.tier)
        for digest in store.digests():
            entry = listed.setdefault(digest, Listed(digest))
            entry.tiers.append(store.folder.tier)
            try:
                entry.describe(store.version(digest).adapter)
            except (DamagedFile, DigestMismatch) as error:
                entry.problems[store.folder.tier] = error.message
        if current := listed.get(store.current()):
            current.in_force.append(store.folder.tier)
    return sorted(listed.values(), key=lambda entry: (entry.digest != BASE, entry.created))


def _bytes(store: AdapterStore, digest: str) -> int:
    return sum(entry.size for entry in store.version(digest).adapter.files.values())


def _short(digest: str) -> str:
    return digest[:12] or "base"


def _tell(digest: str) -> None:
    typer.echo(f"new sessions get version {_short(digest)}; those that run keep theirs")
