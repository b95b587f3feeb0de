"""Which lines of a process were reached: shared memory in a file, written there and read here."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import CodeType
from typing import Final, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

Marks: TypeAlias = NDArray[np.bool_]
"""One for every byte of a Reach."""

_ARCS: Final = 1 << 16
"""Bytes for steps from one line to another, by hash: a loop or a branch that is taken anew shows there."""

_FUNCTION: Final = 0x1
"""The flag of code that is a function's, not a module's or a class's."""


class Reach:
    """A byte for every line of some modules' sources, and one for every hash of two lines.

    A process that runs under `tests.fuzzing.traced` sets them; whoever reads them may set them back.
    """

    def __init__(self, folder: Path) -> None:
        """What make() has put into `folder`."""
        self.offsets: dict[str, int] = json.loads((folder / "offsets.json").read_text())
        with (folder / "reach").open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), 0)
        self.arcs = len(self.memory) - _ARCS
        self._before = self.snapshot()

    @classmethod
    def make(cls, folder: Path, modules: Sequence[str]) -> Self:
        offsets, end = {}, 0
        for name in modules:
            spec = find_spec(name)
            assert spec
            assert spec.origin
            offsets[spec.origin] = end
            end += len(Path(spec.origin).read_bytes().splitlines()) + 1
        folder.mkdir()
        (folder / "offsets.json").write_text(json.dumps(offsets))
        (folder / "reach").write_bytes(bytes(end + _ARCS))
        return cls(folder)

    def snapshot(self) -> Marks:
        """Lines and arcs reached since the beginning, or since clear()."""
        return np.frombuffer(self.memory[:], np.bool_)

    def clear(self) -> None:
        self.memory[:] = bytes(len(self.memory))

    def begin(self) -> None:
        """What was reached before is what starts a process, and counts no more."""
        self._before = self.snapshot()
        self.clear()

    def functions(self) -> dict[str, Marks]:
        """The lines of every function by its name, where snapshot() has those that were reached."""
        functions = {}
        for path, offset in self.offsets.items():
            for code in _functions(compile(Path(path).read_text(encoding="utf-8"), path, "exec")):
                lines = np.zeros(len(self.memory), np.bool_)
                lines[[offset + line for line in _lines(code)]] = True
                lines &= ~self._before
                if lines.any():
                    functions[f"{Path(path).parent.name}/{Path(path).stem}.{code.co_qualname}"] = lines
        return functions

    def numbers(self, lines: Marks) -> list[int]:
        """Their numbers, each in its own file."""
        starts = np.array(sorted(self.offsets.values()))
        places = np.flatnonzero(lines)
        found: list[int] = (places - starts[np.searchsorted(starts, places, side="right") - 1]).tolist()
        return found


def _functions(code: CodeType) -> Iterator[CodeType]:
    """The functions in a module; those within another one are part of it."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            if inner.co_flags & _FUNCTION:
                yield inner
            else:
                yield from _functions(inner)


def _lines(code: CodeType) -> Iterator[int]:
    """Lines of a function, but the one that it begins with."""
    yield from (line for _, _, line in code.co_lines() if line and line != code.co_firstlineno)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _lines(inner)
