"""`trifold node`: this machine as a node of a deployment."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from trifold.shared.errors import TrifoldError
from trifold.shared.identity.enrolment import enrol
from trifold.shared.identity.keeper import Keeper
from trifold.shared.identity.node import Node

node = typer.Typer(no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="Folder of the node.")]


@node.callback()
def _node() -> None:
    """This machine as a node: its key and its certificate."""


@node.command()
def enroll(
    authority: Annotated[str, typer.Argument(help="HOST:PORT of `trifold certs serve`.")],
    token: Annotated[
        str, typer.Option("--token", envvar="TRIFOLD_TOKEN", help="From `trifold certs token`.")
    ],
    fingerprint: Annotated[
        str, typer.Option("--fingerprint", help="That of the authority, as `trifold certs init` told it.")
    ],
    into: Annotated[Path, typer.Option("--into", help="New folder for its key and certificate.")],
) -> None:
    """Make a key, and get a certificate for it."""
    asyncio.run(_enroll(authority, token, fingerprint, into))


@node.command()
def renew(folder: Folder) -> None:
    """Renew the certificate now. Running services and clients do so by themselves, and take this one, too."""
    enrolled = Node(folder)
    asyncio.run(Keeper(enrolled).renew())
    _tell(enrolled)


@node.command()
def show(folder: Folder) -> None:
    """Tell who the node is, and how long its certificate holds."""
    _tell(Node(folder))


async def _enroll(authority: str, token: str, fingerprint: str, into: Path) -> None:
    enrolled = await enrol(authority, token, fingerprint, into)
    _tell(enrolled)
    try:
        await Keeper(enrolled, revoked=True).look()
    except TrifoldError as error:
        # Now, and not in twelve hours.
        hint = "does `trifold certs init --host` have the host of this address?"
        typer.echo(f"trifold: it could not be renewed as it is now: {error.message}; {hint}", err=True)


def _tell(enrolled: Node) -> None:
    ends = enrolled.papers.certificate.not_valid_after_utc
    good = f"{enrolled.identity}, certificate good until {ends:%Y-%m-%d %H:%M:%S} UTC"
    typer.echo(enrolled.papers.ended or good)
