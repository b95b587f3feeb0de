"""`trifold federated-demo`: three sites teach a served model their texts, on one machine."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from trifold.device.client.client import Client
from trifold.device.demo.federated.federation import Federation
from trifold.device.demo.federated.texts import write_texts
from trifold.shared.cli.service_process import ServiceProcess
from trifold.shared.errors import ConfigError, TrifoldError

PROMPT: Final = " |  copy(self)\n |      Return a"
"""Of a manual page."""

CUTS: Final = "2/5"
"""With a layer on the device, so that both of a site's shards are trained."""

_SAMPLING: Final[dict[str, Any]] = {"max_tokens": 64, "temperature": 0.7, "top_p": 0.9, "seed": 1}

SETTINGS: Final = (
    "sites=3",
    "quorum=2",
    "local.learning_rate=0.01",
    "local.warmup=10",
    "local.evaluate=4",
)


def federated_demo(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the checkpoint to split and train.")],
    folder: Annotated[Path, typer.Option(help="Folder to work in; must not exist.")] = Path(
        "build/federated-demo"
    ),
    rounds: Annotated[int, typer.Option(min=1, help="Federated rounds.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a site in a round.")] = 12,
    prompt: Annotated[str, typer.Option(help="What to complete before and after.")] = PROMPT,
    app: Annotated[Path, typer.Option(help="The Flower app of Trifold.")] = Path("deploy/flower"),
) -> None:
    """Serve a model, fine-tune it at three sites that keep their texts, and promote the result live."""
    console = Console(highlight=False)
    if folder.exists():
        raise ConfigError(f"{folder} exists: remove it, or name another folder")
    folder = folder.absolute()
    bundle, run = folder / "bundle", folder / "run"
    console.print(f"[bold]Splitting[/] {checkpoint}")
    _trifold("split", str(checkpoint), "--out", str(bundle), "--cuts", CUTS, "--train")
    sites = write_texts(folder / "texts")
    console.print(f"[bold]Sites[/] {', '.join(sites)}: their texts are in {folder / 'texts'}")
    with _serving(bundle) as edge, Client(edge, bundle=bundle) as client:
        before = _complete(client, prompt)
        began = time.monotonic()
        with Federation(folder / "federation", bundle, sites, app) as federation:
            console.print(f"[bold]Federation[/] of {len(federation.processes)} processes, on loopback\n")
            told = [*SETTINGS, f"rounds={rounds}", f"local.steps={steps}"]
            federation.federate(
                "run", str(run), *(word for item in told for word in ("--set", item)), quiet=False
            )
        console.print(f"\n[bold]Trained[/] in {time.monotonic() - began:.0f} s")
        digest = _trifold("adapter", "add", str(bundle), str(run / "adapter.safetensors")).split()[-1]
        _trifold("adapter", "promote", str(bundle), digest)
        console.print(f"[bold]Promoted[/] {digest[:12]} into the tiers that serve; nothing was restarted\n")
        _wait_for(client, digest)
        after = _complete(client, prompt)
    for when, text in (("Before", before), ("After", after)):
        console.print(f"[bold]{when}[/]")
        console.out(prompt + text, highlight=False)


@contextmanager
def _serving(bundle: Path) -> Iterator[str]:
    """Cloud and edge; gives the edge's address."""
    with (
        ServiceProcess(["cloud", "serve", str(bundle), "--listen", "127.0.0.1:0"]) as cloud,
        ServiceProcess(
            ["edge", "serve", str(bundle), "--listen", "127.0.0.1:0", "--core", cloud.address]
        ) as edge,
    ):
        yield edge.address


def _complete(client: Client, prompt: str) -> str:
    return "".join(chunk.text for chunk in client.generate(prompt, **_SAMPLING))


def _wait_for(client: Client, digest: str) -> None:
    """Until new sessions get the version. Raises TrifoldError when they do not for long."""
    for _ in range(60):
        if client.adapter == digest:
            return
        time.sleep(0.5)
    raise TrifoldError(f"the device has not taken up the version {digest[:12]}")


def _trifold(*arguments: str) -> str:
    """Runs a command, as a person would, and returns what it printed."""
    command = [sys.executable, "-m", "trifold.shared.cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TrifoldError(f"`trifold {' '.join(arguments)}` ended with {done.returncode}:\n{done.stderr}")
    return done.stdout
