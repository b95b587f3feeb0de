"""How a service comes up: settings, shard, self-test."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Protocol, TypeVar

import typer

from trifold.shared.bundle.folder import TierFolder
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


P = TypeVar("P", bound=Proved)


def load_tier(settings: ServiceSettings, tier: Tier, load: Callable[[TierFolder], P]) -> tuple[Manifest, P]:
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
    shard = load(folder)
    if not shard.exact and not settings.inexact:
        raise NotExact(
            f"the self-test of the {tier} shard failed on {shard.fingerprint}: what it gives would depend "
            "on how a prompt is cut. Use other hardware, or give --inexact to run it all the same"
        )
    found = "exact" if shard.exact else "NOT EXACT (--inexact)"
    _tell(f"ready after {perf_counter() - began:.1f} s: {found}, {shard.fingerprint}")
    return folder.manifest, shard


def _tell(line: str) -> None:
    typer.echo(line, err=True)
