"""`trifold version`: what to quote in a report of a bug."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version as installed
from typing import Annotated

import trifold.shared.runtime.untold  # noqa: F401  # isort: skip - before onnxruntime

import onnxruntime as ort
import typer


def version(
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Print the versions of Trifold and of what it computes and talks with."""
    versions = {package: installed(package) for package in ("trifold", "grpcio", "numpy")}
    # Its package has another name where it brings a GPU's providers.
    versions |= {"onnxruntime": str(ort.__version__), "python": platform.python_version()}
    if as_json:
        typer.echo(json.dumps(versions))
    else:
        for package, number in versions.items():
            typer.echo(f"{package:12} {number}")
