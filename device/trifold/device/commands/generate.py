"""`trifold generate`: a completion, streamed to stdout as it comes."""

from __future__ import annotations

import asyncio
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
from trifold.shared.cli.logs import show_log
from trifold.shared.errors import Cancelled, InvalidRequest
from trifold.shared.settings import DeviceSettings
from trifold.shared.telemetry import traces as tracing

FIXED = ("prompt", "journal", "max_tokens", "temperature", "top_k", "top_p", "seed", "stop")
"""Parameters that a journal has settled."""


def generate(
    context: typer.Context,
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
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a chunk; its trace only with --trace.")
    ] = False,
    timeout: options.Timeout = None,
    threads: options.Threads = None,
    inexact: options.Inexact = None,
    tls: options.Tls = None,
    insecure: options.Insecure = None,
    log_level: options.LogLevel = None,
    traces: options.Traces = None,
    config: options.Config = None,
) -> None:
    """Continue a text with the device's part of the model here and the rest behind an edge."""
    if resume:
        _refuse_fixed(context)
    settings = DeviceSettings.load(
        config,
        edge=edge,
        bundle=bundle,
        timeout=timeout,
        threads=threads,
        inexact=inexact,
        tls=tls,
        insecure=insecure,
        log_level=log_level,
        traces=traces,
    )
    show_log(settings.log_level)
    tracing.export(settings.traces, "device", insecure=settings.insecure)
    # Before there is an event loop: Ctrl-C then ends the wait for a terminal at once.
    text = "" if resume else _text(prompt)

    def begin(client: AsyncClient) -> Generation:
        if resume:
            return client.resume(resume)
        return client.generate(
            text,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop or (),
            journal=journal,
        )

    try:
        asyncio.run(_run(settings, begin, Output(as_json=as_json, trace=trace)))
    finally:
        tracing.flush()


async def _run(settings: DeviceSettings, begin: Callable[[AsyncClient], Generation], output: Output) -> None:
    client = AsyncClient(
        settings.edge,
        bundle=settings.bundle,
        timeout=settings.timeout,
        threads=settings.threads,
        inexact=settings.inexact,
        tls=settings.tls,
        insecure=settings.insecure,
    )
    try:
        async with client, begin(client) as generation:
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, generation.cancel)
            async for chunk in generation:
                output.show(chunk)
    finally:
        output.end()
    if chunk.finish_reason == "cancelled":
        raise Cancelled("the generation was cancelled")


def _refuse_fixed(context: typer.Context) -> None:
    for name in FIXED:
        source = context.get_parameter_source(name)
        if source and source.name != "DEFAULT":
            flag = "--" + name.replace("_", "-")
            raise InvalidRequest(f"--resume goes on with a journal, by its own parameters: leave out {flag}")


def _text(prompt: str | None) -> str:
    if prompt in (None, "-"):
        if sys.stdin.isatty():
            typer.echo("The prompt, please; Ctrl-D ends it.", err=True)
        prompt = sys.stdin.read()
    if not prompt:
        raise InvalidRequest("the prompt is empty: give --prompt TEXT, or text on stdin")
    return prompt
