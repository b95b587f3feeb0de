"""`trifold demo`: the main job on one machine: split, serve on loopback, complete a prompt, show the cost."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from trifold.device.client.client import Client
from trifold.device.demo.completion import Completion
from trifold.shared.cli.service_process import ServiceProcess
from trifold.shared.errors import TrifoldError

PROMPT = '''def read_lines(path):
    """Return the lines of a text file, without the line ends."""'''


def demo(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the checkpoint to split and run.")],
    prompt: Annotated[str, typer.Option(help="What to complete.")] = PROMPT,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 96,
    temperature: Annotated[float, typer.Option(help="0 always takes the most probable token.")] = 0.6,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Run a model in three processes on this machine and show where the time of a token went."""
    console = Console(stderr=as_json, highlight=False)
    with tempfile.TemporaryDirectory(prefix="trifold-demo-") as folder:
        bundle = Path(folder) / "bundle"
        console.print(f"[bold]Splitting[/] {checkpoint}")
        _split(checkpoint, bundle, console)
        cloud_command = ["cloud", "serve", str(bundle), "--listen", "127.0.0.1:0"]
        with ServiceProcess(cloud_command) as cloud:
            console.print(f"[bold]Cloud[/] on {cloud.address}, process {cloud.pid}")
            edge_command = ["edge", "serve", str(bundle), "--listen", "127.0.0.1:0", "--core", cloud.address]
            with ServiceProcess(edge_command) as edge, Client(edge.address, bundle=bundle) as client:
                console.print(f"[bold]Edge[/] on {edge.address}, process {edge.pid}")
                console.print("[bold]Device[/] is this process\n")
                completion = _complete(client, prompt, max_tokens, temperature, console)
    if as_json:
        print(json.dumps(completion.as_dict(), indent=2))
    else:
        completion.print(console)


def _split(checkpoint: Path, bundle: Path, console: Console) -> None:
    """Runs `trifold split`, as a person would."""
    command = [
        sys.executable,
        "-m",
        "trifold.shared.cli.main",
        "split",
        str(checkpoint),
        "--out",
        str(bundle),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TrifoldError(f"`trifold split` ended with exit code {done.returncode}:\n{done.stderr}")
    console.print(done.stdout, end="")


def _complete(
    client: Client, prompt: str, max_tokens: int, temperature: float, console: Console
) -> Completion:
    """Streams the completion to the console."""
    began = time.monotonic()
    chunks = []
    console.print(f"[dim]{prompt}[/]", end="", markup=True)
    for chunk in client.generate(prompt, max_tokens=max_tokens, temperature=temperature, seed=1):
        chunks.append(chunk)
        console.out(chunk.text, end="", highlight=False)
    console.print()
    return Completion(prompt, chunks, time.monotonic() - began)
