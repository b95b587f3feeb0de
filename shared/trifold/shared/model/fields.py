"""Fields: a Hugging Face config.json read with types, each complaint naming the key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Any, Final

from trifold.shared.errors import DamagedFile, UnsupportedModel

REQUIRED: Final[Any] = object()
"""Says that a key has no default."""

_LARGEST: Final = 2**31 - 1


class Fields:
    """The keys of a config. A key that is null counts as absent, as it does in transformers.

    Raises DamagedFile for a key that is missing or of the wrong type, UnsupportedModel for a value that
    Trifold cannot serve.
    """

    def __init__(self, values: Mapping[str, Any], source: str = "config.json") -> None:
        self.values = values
        self.source = source

    @classmethod
    def load(cls, folder: Path) -> Fields:
        """config.json of a checkpoint, with the token ids of generation_config.json where that names any."""
        path = folder / "config.json"
        values = read_json(path)
        generation = folder / "generation_config.json"
        if generation.exists():
            named = ((key, value) for key, value in read_json(generation).items() if value is not None)
            values |= {key: value for key, value in named if key in ("bos_token_id", "eos_token_id")}
        return cls(values, str(path))

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(self, name: str, default: Any = REQUIRED, *, least: int = 1, most: int = _LARGEST) -> int:
        value = self._get(name, default)
        if type(value) is not int or not least <= value <= most:
            raise self._wrong(name, value, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, default: Any = REQUIRED, *, above: float = -inf) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not above < value < inf:
            raise self._wrong(name, value, "a number" if above == -inf else f"a number above {above}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if type(value) is not bool:
            raise self._wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: Any = REQUIRED) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings; empty when absent."""
        value = self._get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name, value, "a list of strings")
        return tuple(value)

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers, or a single one; empty when absent."""
        value = self._get(name, [])
        listed = value if isinstance(value, list) else [value]
        if not all(type(item) is int and 0 <= item <= _LARGEST for item in listed):
            raise self._wrong(name, value, "a list of whole numbers")
        return tuple(listed)

    def section(self, name: str) -> Fields | None:
        """An object inside the config, or None when absent or empty."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return Fields(value, f"{self.source}: {name}") if value else None

    def expect(self, name: str, *supported: object) -> None:
        """Refuse the model when the key has a value other than these; an absent key is taken as fine."""
        value = self.values.get(name)
        if value is not None and value not in supported:
            known = " or ".join(repr(item) for item in supported)
            raise UnsupportedModel(f"{self.source}: {name} {value!r} is not supported, only {known}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise DamagedFile(f"{self.source}: {name} is missing")
        return default

    def _wrong(self, name: str, value: object, wanted: str) -> DamagedFile:
        return DamagedFile(f"{self.source}: {name} is {value!r}, not {wanted}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises DamagedFile, naming the file, when there is none."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise DamagedFile(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DamagedFile(f"{path}: is not a JSON object")
    return value
