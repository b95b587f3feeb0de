"""`trifold version`: what to quote in a report of a bug."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version as installed
from typing import Annotated

import typer


def version(
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Print the versions of Trifold and of what it computes and talks with."""
    versions = {package: installed(package) for package in ("trifold", "onnxruntime", "grpcio", "numpy")}
    versions["python"] = platform.python_version()
    if as_json:
        typer.echo(json.dumps(versions))
    else:
        for package, number in versions.items():
            typer.echo(f"{package:12} {number}")
