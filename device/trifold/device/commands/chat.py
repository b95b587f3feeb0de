"""`trifold chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

from trifold.device.client.chat import Message
from trifold.device.client.client import Client, Generation
from trifold.device.commands import options
from trifold.shared.cli.logs import show_log
from trifold.shared.errors import TrifoldError
from trifold.shared.settings import DeviceSettings
from trifold.shared.telemetry import traces as tracing

HELP = "/reset begins a new conversation, /quit (or Ctrl-D) leaves, Ctrl-C ends an answer."


def chat(
    edge: options.Edge = None,
    bundle: options.Bundle = None,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told first.")] = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    timeout: options.Timeout = None,
    threads: options.Threads = None,
    inexact: options.Inexact = None,
    tls: options.Tls = None,
    insecure: options.Insecure = None,
    log_level: options.LogLevel = None,
    traces: options.Traces = None,
    config: options.Config = None,
) -> None:
    """Talk with a model that has a chat template."""
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
    client = Client(
        settings.edge,
        bundle=settings.bundle,
        timeout=settings.timeout,
        threads=settings.threads,
        inexact=settings.inexact,
        tls=settings.tls,
        insecure=settings.insecure,
    )

    def answer(conversation: list[Message]) -> Generation:
        return client.generate(
            client.chat_prompt(conversation),
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop or (),
        )

    try:
        with client:
            _talk(answer, [Message(role="system", content=system)] if system else [])
    finally:
        tracing.flush()


def _talk(answer: Callable[[list[Message]], Generation], beginning: list[Message]) -> None:
    answer([*beginning, Message(role="user", content="")]).close()  # a model that cannot chat says so now
    conversation = list(beginning)
    typer.echo(HELP, err=True)
    for said in _lines():
        match said:
            case "/quit":
                return
            case "/reset":
                conversation = list(beginning)
            case "/help":
                typer.echo(HELP, err=True)
            case _ if said.startswith("/"):
                typer.echo(f"There is no {said.split()[0]}. {HELP}", err=True)
            case _:
                question = Message(role="user", content=said)
                try:
                    reply = _show(answer([*conversation, question]))
                    conversation += [question, Message(role="assistant", content=reply)]
                except TrifoldError as error:
                    typer.echo(f"trifold: {error.message}", err=True)


def _lines() -> Iterator[str]:
    """What the user types, until Ctrl-D or, at the prompt, Ctrl-C."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line


def _show(generation: Generation) -> str:
    """Prints an answer as it comes, and returns it; Ctrl-C ends it where it is."""
    said = ""
    with generation:
        try:
            for chunk in generation:
                said += chunk.text
                print(chunk.text, end="", flush=True)
        except KeyboardInterrupt:
            pass
    print()
    return said
