"""`trifold doctor`: what is wrong with this machine, and what to do about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from trifold.edge.doctor import report
from trifold.edge.doctor.authority import AUTHORITY
from trifold.edge.doctor.bundle import BUNDLE
from trifold.edge.doctor.certificate import CERTIFICATE
from trifold.edge.doctor.check import Check
from trifold.edge.doctor.clock import CLOCK
from trifold.edge.doctor.core import CORE
from trifold.edge.doctor.disk import DISK
from trifold.edge.doctor.engines import ENGINES
from trifold.edge.doctor.finding import skipped
from trifold.edge.doctor.jetson import JETSON
from trifold.edge.doctor.link import LINK
from trifold.edge.doctor.memory import MEMORY
from trifold.edge.doctor.numerics import NUMERICS
from trifold.edge.doctor.patient import Patient
from trifold.edge.doctor.processor import PROCESSOR
from trifold.edge.doctor.providers import PROVIDERS
from trifold.edge.doctor.settings import DoctorSettings
from trifold.edge.doctor.versions import VERSIONS

CHECKS: Final[tuple[Check, ...]] = (
    *(VERSIONS, PROCESSOR, MEMORY, DISK, JETSON, PROVIDERS),
    *(BUNDLE, NUMERICS, ENGINES),
    *(CERTIFICATE, AUTHORITY, CLOCK, CORE, LINK),
)


def doctor(
    bundle: Annotated[Path | None, DoctorSettings.flag("bundle")] = None,
    core: Annotated[str | None, DoctorSettings.flag("core")] = None,
    tls: Annotated[Path | None, DoctorSettings.flag("tls")] = None,
    insecure: Annotated[bool | None, DoctorSettings.flag("insecure")] = None,
    threads: Annotated[int | None, DoctorSettings.flag("threads")] = None,
    timeout: Annotated[float | None, DoctorSettings.flag("timeout")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML file of settings. [TRIFOLD_CONFIG]")
    ] = None,
) -> None:
    """Examine this machine, and say for each fault what to do.

    It always looks at versions, processor, memory, disks, a Jetson's own software, and runs an inference on
    every execution provider of ONNX Runtime. With --bundle it checks every digest and runs the numerics
    self-test, and where that is a core's part alone, every engine that could serve it; with --tls it looks
    at the node's certificate and asks its authority; with --core it compares the clocks and measures the
    round trip; with --bundle and --core it measures the bandwidth, in a session of random rows. What was not
    given is skipped. Nothing is changed, neither here nor there, but that an engine which TensorRT builds is
    kept for serving.

    The settings of `trifold edge serve` (trifold.toml, TRIFOLD_EDGE_*) count here, too: where that is set up,
    `trifold doctor` alone examines what it would serve with.

    It ends with exit code 1 where there is a fault; warnings, and what was skipped, leave it 0.
    """
    settings = DoctorSettings.load(
        config, bundle=bundle, core=core, tls=tls, insecure=insecure, threads=threads, timeout=timeout
    )
    findings = _examined(replace(settings.patient(), config=config))
    if as_json:
        typer.echo(report.as_json(findings))
    else:
        console = Console(highlight=False)
        console.print(report.table(findings))
        console.print(f"\n{report.summary(findings)}")
    if not report.healthy(findings):
        raise typer.Exit(1)


def _examined(patient: Patient) -> report.Findings:
    """What all checks find; on a terminal it shows which one is at work."""
    findings: report.Findings = []
    with Console(stderr=True).status("examining …") as status:
        for check in CHECKS:
            status.update(f"examining: {check.name}")
            if check.as_node and not _trusted(findings):
                findings.append((check.name, skipped("the node's certificate does not hold")))
            else:
                findings += [(check.name, finding) for finding in check.findings(patient)]
    return findings


def _trusted(findings: report.Findings) -> bool:
    """Whether nothing was found, neither here nor by the authority, that others refuse the node for."""
    asked = (CERTIFICATE.name, AUTHORITY.name)
    return report.healthy([(name, finding) for name, finding in findings if name in asked])
