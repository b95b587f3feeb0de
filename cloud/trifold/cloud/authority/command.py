"""`trifold certs`: the authority of a deployment."""

from __future__ import annotations

import asyncio
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Final

import typer

from trifold.cloud.authority.authority import SERVICES, Authority
from trifold.cloud.authority.service import AuthorityServer
from trifold.shared.cli.logs import log_service
from trifold.shared.errors import ConfigError
from trifold.shared.identity.name import ROLES, Identity
from trifold.shared.session.watchdog import watched
from trifold.shared.settings import AuthoritySettings

certs = typer.Typer(no_args_is_help=True)

_FOLDER_HELP: Final = "Folder of the authority: its keys and its register."
Folder = Annotated[Path, typer.Argument(help=_FOLDER_HELP)]


@certs.callback()
def _certs() -> None:
    """The authority that gives nodes their certificates."""


@certs.command()
def init(
    folder: Folder,
    host: Annotated[
        list[str] | None,
        typer.Option("--host", help="Name or address that nodes will reach it at; may be repeated."),
    ] = None,
) -> None:
    """Make a new authority."""
    authority = Authority.init(folder, host or ["localhost", "127.0.0.1"])
    typer.echo(f"made an authority in {folder}; who can read its root.key can be anybody: keep it")
    typer.echo(f"fingerprint {authority.fingerprint}")


@certs.command()
def token(
    folder: Folder,
    node: Annotated[str, typer.Option("--node", help="Name of the node.")],
    role: Annotated[str, typer.Option("--role", help="What it is: " + ", ".join(ROLES[:-1]) + ".")],
    tenant: Annotated[
        list[str], typer.Option("--tenant", help="Whose it is; repeated for a core that serves several.")
    ],
    host: Annotated[
        list[str] | None,
        typer.Option("--host", help="Name or address that callers will write for it; may be repeated."),
    ] = None,
    hours: Annotated[
        float, typer.Option("--hours", min=0.01, max=168, help="How long the token holds.")
    ] = 1.0,
) -> None:
    """Print a token with which a node enrols, once."""
    if role not in ROLES[:-1]:
        raise ConfigError(f"--role is {role!r}: it must be {', '.join(ROLES[:-1])}")
    identity = Identity(tuple(tenant), role, node)
    typer.echo(Authority(folder).invite(identity, host or (), timedelta(hours=hours)))


@certs.command()
def revoke(
    folder: Folder,
    node: Annotated[str, typer.Argument(help="Name of the node, or trifold://TENANT/ROLE/NODE.")],
) -> None:
    """Let a node in nowhere any more, within a minute: its certificates, tokens and open streams.

    Others go on calling a core, an edge or a gateway until its certificate has run out: stop it, too.
    """
    register = Authority(folder).register
    identity = register.entry(node).identity
    number = register.revoke(node)
    typer.echo(f"revoked {identity.node}: {number} certificate{'s' * (number != 1)}")
    if identity.role in SERVICES:
        called = f"others go on calling this {identity.role} until its certificate has run out"
        typer.echo(f"{called}, in 24 hours at most: stop it, too, or let its --host lead elsewhere")


@certs.command(name="list")
def list_(folder: Folder) -> None:
    """Show all nodes and how long their certificates hold."""
    for standing in Authority(folder).register.nodes():
        typer.echo(f"{standing.entry.identity!s:<48} {standing.told(datetime.now(UTC))}")


@certs.command()
def serve(
    folder: Annotated[Path | None, AuthoritySettings.flag("folder")] = None,
    listen: Annotated[str | None, AuthoritySettings.flag("listen")] = None,
    listen_nodes: Annotated[str | None, AuthoritySettings.flag("listen_nodes")] = None,
    life: Annotated[float | None, AuthoritySettings.flag("life")] = None,
    log_level: Annotated[str | None, AuthoritySettings.flag("log_level")] = None,
    log_format: Annotated[str | None, AuthoritySettings.flag("log_format")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML file of settings. [TRIFOLD_CONFIG]")
    ] = None,
) -> None:
    """Enrol nodes and renew their certificates, until SIGTERM."""
    settings = AuthoritySettings.load(
        config,
        folder=folder,
        listen=listen,
        listen_nodes=listen_nodes,
        life=life,
        log_level=log_level,
        log_format=log_format,
    )
    log_service(settings.log_level, settings.log_format)
    asyncio.run(_serve(settings))


async def _serve(settings: AuthoritySettings) -> None:
    authority = Authority(settings.folder, timedelta(seconds=settings.life))
    server = AuthorityServer(authority, settings.listen, settings.listen_nodes)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await server.start()
    where = f"{server.enrolment}, for nodes on {server.renewal}"
    async with watched():
        print(f"trifold authority ready on {where}, fingerprint {authority.fingerprint}", flush=True)
        await stopping.wait()
        await server.stop()
