"""`trifold edge train` and `trifold edge join`: a site of a federation."""

from __future__ import annotations

import os
import socket as sockets
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tokenizers import Tokenizer

from trifold.edge.federation.resident import serve
from trifold.edge.federation.text import SiteText
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.cli.logs import log_service
from trifold.shared.errors import ConfigError
from trifold.shared.identity.name import NAME, NAME_RULE
from trifold.shared.session.channel import on_loopback
from trifold.shared.settings import JoinSettings, SiteSettings

if TYPE_CHECKING:
    from trifold.edge.federation.core import RemoteCore
    from trifold.shared.bundle.manifest import CodecName

Config = Annotated[Path | None, typer.Option("--config", help="TOML file of settings. [TRIFOLD_CONFIG]")]


def train(
    bundle: Annotated[Path | None, SiteSettings.flag("bundle")] = None,
    text: Annotated[Path | None, SiteSettings.flag("text")] = None,
    name: Annotated[str | None, SiteSettings.flag("name")] = None,
    simulation: Annotated[bool | None, SiteSettings.flag("simulation")] = None,
    cloud: Annotated[str | None, SiteSettings.flag("cloud")] = None,
    state: Annotated[Path | None, SiteSettings.flag("state")] = None,
    listen: Annotated[Path | None, SiteSettings.flag("listen")] = None,
    timeout: Annotated[float | None, SiteSettings.flag("timeout")] = None,
    threads: Annotated[int | None, SiteSettings.flag("threads")] = None,
    tls: Annotated[Path | None, SiteSettings.flag("tls")] = None,
    insecure: Annotated[bool | None, SiteSettings.flag("insecure")] = None,
    log_level: Annotated[str | None, SiteSettings.flag("log_level")] = None,
    log_format: Annotated[str | None, SiteSettings.flag("log_format")] = None,
    config: Config = None,
) -> None:
    """Hold a site's shards and text ready, and train when a federated run asks, until the process ends."""
    settings = SiteSettings.load(
        config,
        bundle=bundle,
        text=text,
        name=name,
        simulation=simulation,
        cloud=cloud,
        state=state,
        listen=listen,
        timeout=timeout,
        threads=threads,
        tls=tls,
        insecure=insecure,
        log_level=log_level,
        log_format=log_format,
    )
    log_service(settings.log_level, settings.log_format)
    if settings.threads:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    # torch takes seconds to import, and the other commands of the edge do without it.
    try:
        from trifold.edge.federation.core import RemoteCore
        from trifold.edge.federation.trainer import SiteTrainer
    except ModuleNotFoundError as error:
        needed = f"trifold edge train needs the package {error.name}"
        raise ConfigError(f"{needed}: install Trifold with the extra 'train'") from None
    edge, device = (TierFolder.open(settings.bundle, tier) for tier in ("edge", "device"))
    typer.echo(f"reading {settings.text} …", err=True)
    texts = _texts(settings, device)
    for name, read in texts.items():
        told = f"{len(read.training):,} tokens to train on, {len(read.heldout):,} held out"
        typer.echo(f"{name}: {told}", err=True)
    try:
        settings.state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--state {settings.state}: no folder can be made: {error.strerror}") from None

    def core(gradients: CodecName) -> RemoteCore:
        return RemoteCore(
            settings.cloud,
            edge.manifest,
            gradients,
            timeout=settings.timeout,
            tls=settings.tls,
            insecure=settings.insecure,
        )

    trainer = SiteTrainer(edge, device, texts, core, settings.state)
    serve((settings.listen or settings.state / "trainer.sock").absolute(), trainer.answer)


def join(
    superlink: Annotated[str | None, JoinSettings.flag("superlink")] = None,
    trainer: Annotated[Path | None, JoinSettings.flag("trainer")] = None,
    port: Annotated[int | None, JoinSettings.flag("port")] = None,
    root_certificates: Annotated[Path | None, JoinSettings.flag("root_certificates")] = None,
    key: Annotated[Path | None, JoinSettings.flag("key")] = None,
    insecure: Annotated[bool | None, JoinSettings.flag("insecure")] = None,
    config: Config = None,
) -> None:
    """Connect a site's trainer to a federation, as a SuperNode of Flower, until the process ends."""
    settings = JoinSettings.load(
        config,
        superlink=superlink,
        trainer=trainer,
        port=port,
        root_certificates=root_certificates,
        key=key,
        insecure=insecure,
    )
    if settings.insecure == (settings.root_certificates is not None):
        raise ConfigError("give either --root-certificates (and --key), or --insecure for loopback")
    if settings.insecure and not on_loopback(settings.superlink):
        raise ConfigError(
            f"{settings.superlink} is not on loopback: without TLS anyone on the way could join in"
        )
    if not find_spec("flwr"):
        raise ConfigError("trifold edge join needs Flower: install Trifold with the extra 'federated'")
    _check_port(settings.port)
    from trifold.edge.federation.node import run

    socket = settings.trainer.absolute()
    arguments = ["--superlink", settings.superlink, "--node-config", f'trainer="{socket}"']
    if settings.root_certificates:
        arguments += ["--root-certificates", str(settings.root_certificates)]
    else:
        arguments += ["--insecure"]
    if settings.key:
        arguments += ["--auth-supernode-private-key", str(settings.key)]
    run(arguments, settings.port)


def _check_port(port: int) -> None:
    """Raises ConfigError when it is taken: Flower would say so in a traceback."""
    with sockets.socket() as probe:
        probe.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise ConfigError(f"127.0.0.1:{port} is taken: give this node another --port") from None


def _texts(settings: SiteSettings, device: TierFolder) -> dict[str, SiteText]:
    """The text of each site, by name."""
    folder = settings.text
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: --text names the folder of the site's text files")
    if bool(settings.name) == settings.simulation:
        raise ConfigError(
            "give either the site's name (--site), or --simulation for a site of every folder in --text"
        )
    if settings.simulation:
        folders = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
    else:
        folders = {settings.name: folder}
    for name in folders:
        if not NAME.fullmatch(name):
            raise ConfigError(f"{name!r} is no name of a site: {NAME_RULE}")
    if not folders:
        raise ConfigError(f"{folder} has no folders: in a simulation each site has one, with its text")
    tokenizer: Tokenizer = Tokenizer.from_buffer(device.read("tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return {name: SiteText.read(path, tokenizer) for name, path in folders.items()}
