"""`trifold generate`: a completion, streamed to stdout as it comes."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from trifold.device.client.async_client import AsyncClient
from trifold.device.client.generation import Generation
from trifold.device.commands import options
from trifold.device.commands.output import Output
from trifold.shared.config import DeviceSettings
from trifold.shared.errors import Cancelled, InvalidRequest


def generate(
    prompt: Annotated[str | None, typer.Option("--prompt", help="Text to continue; - is stdin.")] = None,
    edge: options.Edge = None,
    bundle: options.Bundle = None,
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    journal: Annotated[Path | None, typer.Option(help="Write what is committed to this new file.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the generation of this journal, by its own parameters.")
    ] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Tell on stderr where time and bytes went.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a chunk.")] = False,
    timeout: options.Timeout = None,
    threads: options.Threads = None,
    inexact: options.Inexact = None,
    log_level: options.LogLevel = None,
    config: options.Config = None,
) -> None:
    """Continue a text with the device's part of the model here and the rest behind an edge."""
    if resume and (prompt or journal):
        raise InvalidRequest("--resume goes on with a journal: it takes neither --prompt nor --journal")
    settings = DeviceSettings.load(
        config,
        edge=edge,
        bundle=bundle,
        timeout=timeout,
        threads=threads,
        inexact=inexact,
        log_level=log_level,
    )
    logging.basicConfig(level=settings.log_level.upper())

    def begin(client: AsyncClient) -> Generation:
        if resume:
            return client.resume(resume)
        return client.generate(
            _text(prompt),
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop or (),
            journal=journal,
        )

    asyncio.run(_run(settings, begin, Output(as_json=as_json, trace=trace)))


async def _run(settings: DeviceSettings, begin: Callable[[AsyncClient], Generation], output: Output) -> None:
    client = AsyncClient(
        settings.edge,
        bundle=settings.bundle,
        timeout=settings.timeout,
        threads=settings.threads,
        inexact=settings.inexact,
    )
    async with client, begin(client) as generation:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, generation.cancel)
        async for chunk in generation:
            output.show(chunk)
    if chunk.finish_reason == "cancelled":
        raise Cancelled("the generation was cancelled")


def _text(prompt: str | None) -> str:
    if prompt not in (None, "-"):
        return prompt
    if sys.stdin.isatty():
        typer.echo("The prompt, please; Ctrl-D ends it.", err=True)
    return sys.stdin.read()
