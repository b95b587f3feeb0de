"""How settings are found: flags over TRIFOLD_* variables over a TOML file over defaults."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import typer
from pydantic import BaseModel, ByteSize, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from trifold.shared.errors import ConfigError

KNOWN: list[type[Settings]] = []
"""All that have a section, as they were defined: a file or variable may speak of any of them."""


class Settings(BaseModel):
    """The settings of one command: those of a class with a `section` of its own, in TOML and in variables."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    section: ClassVar[str]
    positional: ClassVar[str] = ""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        if "section" in vars(cls):
            KNOWN.append(cls)

    @classmethod
    def load(cls, config: Path | None = None, **flags: object) -> Self:
        """The settings of one process; flags that are None count as not given.

        `config` is the TOML file; without it TRIFOLD_CONFIG, then ./trifold.toml where there is one. An empty
        variable counts as not given either.
        Raises ConfigError naming the flag, variable or line that is wrong.
        """
        given = _from_file(config).get(cls.section, {})
        variables = _variables()
        given |= {
            name: Given(value, cls.variable(name))
            for name in cls.model_fields
            if (value := variables.get(cls.variable(name)))
        }
        given |= {
            name: Given(value, cls.spelling(name)) for name, value in flags.items() if value is not None
        }
        try:
            return cls.model_validate({name: value for name, (value, _) in given.items()})
        except ValidationError as error:
            raise ConfigError(cls._explain(error, given)) from None

    @classmethod
    def variable(cls, name: str) -> str:
        return f"TRIFOLD_{cls.section}_{name}".upper()

    @classmethod
    def spelling(cls, name: str) -> str:
        """How a setting is given on the command line: by a flag, or in capitals by its place."""
        return name.upper() if name == cls.positional else "--" + name.replace("_", "-")

    @classmethod
    def flag(cls, name: str) -> Any:
        """The typer.Option (or typer.Argument) of a setting; the parameter's own default must be None."""
        field, spelling = cls.model_fields[name], cls.spelling(name)
        help_ = f"{field.description} [{cls.variable(name)}; default: {cls.default_of(name)}]"
        if not spelling.startswith("--"):
            return typer.Argument(help=help_, show_default=False)
        if field.annotation is bool:
            spelling = f"{spelling}/--no-{spelling[2:]}"
        return typer.Option(spelling, help=help_, show_default=False)

    @classmethod
    def default_of(cls, name: str) -> str:
        field = cls.model_fields[name]
        match field.default:
            case _ if field.is_required():
                return "must be given"
            case None | "":
                return "none"
            case bool(value):
                return "yes" if value else "no"
            case ByteSize() as value:
                return value.human_readable()
            case value:
                return f"{value:g}" if isinstance(value, float) else str(value)

    @classmethod
    def _explain(cls, error: ValidationError, given: dict[str, Given]) -> str:
        problem = error.errors()[0]
        name = str(problem["loc"][0])
        if problem["type"] == "missing":
            where = f"{cls.spelling(name)}, {cls.variable(name)} or {name} in [{cls.section}] of trifold.toml"
            return f"{name} of the {cls.section} is not set: give {where}"
        return f"{given[name].where} is {given[name].value!r}: {_wanted(problem)}"


class Given(NamedTuple):
    """A value and where it was given."""

    value: object
    where: str


def _wanted(problem: ErrorDetails) -> str:
    """What a value should have been."""
    limits = problem.get("ctx", {})
    match problem["type"]:
        case "greater_than":
            return f"it must be above {limits['gt']:g}"
        case "greater_than_equal":
            return f"it must be {limits['ge']:g} or above"
        case "less_than_equal":
            return f"it must be {limits['le']:g} or below"
        case "int_parsing" | "int_type" | "int_from_float":
            return "it must be a whole number"
        case "float_parsing" | "float_type":
            return "it must be a number"
        case "bool_parsing" | "bool_type":
            return "it must be true or false"
        case "byte_size" | "byte_size_unit":
            return "it must be a size such as 512MiB or 8GiB"
        case "literal_error":
            return f"it must be {limits['expected']}"
        case "string_type" | "path_type":
            return "it must be text"
        case _:
            return problem["msg"].removeprefix("Value error, ")


def _variables() -> dict[str, str]:
    """The variables of all tiers; one that none of them has is refused, whichever tier asks."""
    prefixes = tuple(f"TRIFOLD_{settings.section}_".upper() for settings in KNOWN)
    given = {name: value for name, value in os.environ.items() if name.startswith(prefixes)}
    known = [settings.variable(name) for settings in KNOWN for name in settings.model_fields]
    for name in given:
        if name not in known:
            raise ConfigError(f"there is no variable {name}; {_hint(name, known)}")
    return given


def _from_file(config: Path | None) -> dict[str, dict[str, Given]]:
    """Every section of the file; unknown sections and keys are refused, whichever tier asks."""
    named = config or os.environ.get("TRIFOLD_CONFIG")
    path = Path(named or "trifold.toml")
    if not named and not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    known = {settings.section: settings for settings in KNOWN}
    for section, values in content.items():
        if section not in known or not isinstance(values, dict):
            raise _unknown(path, _line(text, section), f"section [{section}]", section, list(known))
        for name in values:
            if name not in known[section].model_fields:
                where = _line(text, name, section)
                what = f"setting {name!r} in [{section}]"
                raise _unknown(path, where, what, name, list(known[section].model_fields))
    return {
        section: {
            name: Given(value, f"{path} line {_line(text, name, section)}, {name},")
            for name, value in values.items()
        }
        for section, values in content.items()
    }


def _unknown(path: Path, line: int, what: str, name: str, known: list[str]) -> ConfigError:
    return ConfigError(f"{path} line {line}: there is no {what}; {_hint(name, known)}")


def _hint(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


def _line(text: str, name: str, section: str | None = None) -> int:
    """The line where `name` is set in `section`, or where a section (or bare key) of that name begins."""
    current = None
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([^\]\s]+)\s*\]", line):
            current = header[1].strip("'\"")
            if section is None and current == name:
                return number
        elif current == section and re.match(rf"""\s*["']?{re.escape(name)}["']?\s*[=.]""", line):
            return number
    return 1
