"""The console script `trifold`: its commands come from the rooms, by entry point."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, Never

import typer

from trifold.shared.cli.version import version
from trifold.shared.errors import ConfigError, TrifoldError


def main() -> None:
    """Run the command of sys.argv; an error becomes a message and an exit code, never a traceback."""
    debug = "--debug" in sys.argv
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        _build(arguments)(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has left; without this Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        _end(error, debug=debug)


def _build(arguments: list[str]) -> typer.Typer:
    """An app with the command that is asked for, or with all of them: each brings its own heavy imports."""
    app = typer.Typer(
        callback=_trifold, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
    )
    installed = entry_points(group="trifold.commands")
    asked = next((word for word in arguments if not word.startswith("-")), "")
    for entry in installed.select(name=asked) or sorted(installed, key=lambda entry: entry.name):
        command = _load(entry, asked)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=entry.name)
        else:
            app.command(entry.name)(command)
    return app


def _show_version(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


def _trifold(
    show_version: Annotated[
        bool, typer.Option("--version", help="As `trifold version`.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")
    ] = False,
) -> None:
    """One Mixture-of-Experts model in three places: cloud, edge and device."""


def _load(entry: EntryPoint, asked: str) -> Any:
    """The command of an entry point. Where an extra is missing, only asking for that command is an error."""
    try:
        return entry.load()
    except ModuleNotFoundError as error:
        room = entry.module.split(".")[1]
        missing = f"needs the package {error.name}: install Trifold with the extra {room!r}"
        if entry.name == asked:
            raise ConfigError(f"trifold {entry.name} {missing}") from error

    def unavailable() -> Never:
        raise AssertionError("never called: `asked` would have been refused above")

    unavailable.__doc__ = f"(Not available: {missing}.)"
    return unavailable


def _end(error: Exception, *, debug: bool) -> Never:
    if debug:
        traceback.print_exception(error)
    if isinstance(error, TrifoldError):
        typer.echo(f"trifold: {error.message}", err=True)
        sys.exit(error.exit_code)
    typer.echo(f"trifold: this is a bug: {type(error).__name__}: {error}", err=True)
    with tempfile.NamedTemporaryFile("w", prefix="trifold-", suffix=".log", delete=False) as details:
        traceback.print_exception(error, file=details)
    typer.echo(f"Please report it with {details.name} and `trifold version`.", err=True)
    sys.exit(TrifoldError.exit_code)


if __name__ == "__main__":
    main()
