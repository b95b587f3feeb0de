"""`trifold edge train` and `trifold edge join`: a site of a federation."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from tokenizers import Tokenizer

from trifold.edge.federation.resident import serve
from trifold.edge.federation.text import SiteText
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.errors import ConfigError

if TYPE_CHECKING:
    from trifold.edge.federation.core import RemoteCore
    from trifold.shared.bundle.manifest import CodecName

_SITE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def train(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle, split with --train.")],
    text: Annotated[Path, typer.Option(help="Folder of the site's text files.")],
    site: Annotated[str, typer.Option(help="Name of the site; in a simulation, none.")] = "",
    cloud: Annotated[
        str, typer.Option(help="HOST:PORT of the cloud's training process.")
    ] = "127.0.0.1:50062",
    state: Annotated[Path, typer.Option(help="Folder that the site keeps between rounds.")] = Path("site"),
    listen: Annotated[
        Path | None, typer.Option(help="Unix socket for the site's node. [default: trainer.sock in --state]")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the cloud.")] = 120.0,
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch; 0 is one per core.")] = 0,
    log_level: Annotated[str, typer.Option(help="Least level logged.")] = "warning",
) -> None:
    """Hold a site's shards and text ready, and train when a federated run asks, until the process ends.

    Without --site, every folder in --text is a site of its own, for Flower's simulation.
    """
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    # torch takes seconds to import, and the other commands of the edge do without it.
    try:
        from trifold.edge.federation.core import RemoteCore
        from trifold.edge.federation.trainer import SiteTrainer
    except ModuleNotFoundError as error:
        needed = f"trifold edge train needs the package {error.name}"
        raise ConfigError(f"{needed}: install Trifold with the extra 'train'") from None
    edge, device = TierFolder.open(bundle, "edge"), TierFolder.open(bundle, "device")
    typer.echo(f"reading {text} …", err=True)
    texts = _texts(text, site, device)

    def core(gradients: CodecName) -> RemoteCore:
        return RemoteCore(cloud, edge.manifest, gradients, timeout=timeout)

    trainer = SiteTrainer(edge, device, texts, core, state)
    serve((listen or state / "trainer.sock").absolute(), trainer.answer)


def join(
    superlink: Annotated[str, typer.Argument(help="HOST:PORT of the federation's SuperLink.")],
    trainer: Annotated[Path, typer.Option(help="Unix socket of the site's trainer.")],
    port: Annotated[int, typer.Option(help="Port on loopback for this node's own processes.")] = 9400,
    root_certificates: Annotated[
        Path | None, typer.Option(help="Certificate of the authority that signed the SuperLink's.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="Private key that the SuperLink knows this site by.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Without TLS: on loopback only.")] = False,
) -> None:
    """Connect a site's trainer to a federation, as a SuperNode of Flower, until the process ends."""
    if insecure == (root_certificates is not None):
        raise ConfigError("give either --root-certificates (and --key), or --insecure for loopback")
    if insecure and not _loopback(superlink):
        raise ConfigError(f"{superlink} is not on loopback: without TLS anyone on the way could join in")
    try:
        from trifold.edge.federation.node import run
    except ModuleNotFoundError as error:
        needed = f"trifold edge join needs the package {error.name}"
        raise ConfigError(f"{needed}: install Trifold with the extra 'federated'") from None
    arguments = ["--superlink", superlink, "--node-config", f'trainer="{trainer.absolute()}"']
    arguments += ["--insecure"] if insecure else ["--root-certificates", str(root_certificates)]
    if key:
        arguments += ["--auth-supernode-private-key", str(key)]
    run(arguments, port)


def _texts(folder: Path, site: str, device: TierFolder) -> dict[str, SiteText]:
    """The text of each site, by name."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: --text names the folder of the site's text files")
    tokenizer: Tokenizer = Tokenizer.from_buffer(device.read("tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    folders = {site: folder} if site else {path.name: path for path in folder.iterdir() if path.is_dir()}
    for name in folders:
        if not _SITE.fullmatch(name):
            raise ConfigError(f"{name!r} is no name of a site: letters, digits, '.', '_' and '-', 64 at most")
    if not folders:
        raise ConfigError(f"{folder} has no folders: give --site, or one folder of text for each site")
    return {name: SiteText.read(path, tokenizer) for name, path in folders.items()}


def _loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
