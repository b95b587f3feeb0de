"""What a benchmark of the core has found, for people and for machines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from trifold.cloud.bench.core import Speed
from trifold.cloud.bench.machine import Machine

_HEADINGS = ("", "ms", "rows/s", "to one", "of prompt")
_SHARES = ("of memory", "of matrix")


@dataclass(frozen=True)
class Report:
    """`decode` is by sessions together; `context` is of each; without a machine there are no shares of it."""

    engine: str
    context: int
    machine: Machine | None
    decode: Mapping[int, Speed]
    prefill: Speed

    def json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def text(self) -> str:
        """Two lines and a table in Markdown.

        Rows a second are told as multiples of those of one session and of the prompt's; what a step reads and
        computes as shares of what the machine can.
        """
        headings = _HEADINGS + _SHARES * (self.machine is not None)
        lines = [f"{self.engine}, {self.context} positions a session"]
        if self.machine:
            read, matrix = self.machine.read_rate / 1e9, self.machine.matrix_rate / 1e9
            lines.append(f"memory gives {read:.1f} GB/s, matrices {matrix:.0f} GFLOP/s")
        lines += ["", f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in self._rows())])

    def _rows(self) -> Iterator[tuple[str, ...]]:
        named = {f"{count} session{'s' * (count > 1)}": speed for count, speed in self.decode.items()}
        for name, speed in {**named, f"prompt of {self.prefill.rows}": self.prefill}.items():
            yield (
                name,
                f"{1000 * speed.seconds:.2f}",
                f"{speed.rows_per_second:.0f}",
                f"{speed.rows_per_second / self.decode[1].rows_per_second:.2f}",
                f"{speed.rows_per_second / self.prefill.rows_per_second:.0%}",
                *self._shares(speed),
            )

    def _shares(self, speed: Speed) -> Iterator[str]:
        if self.machine:
            yield f"{speed.read_bytes / speed.seconds / self.machine.read_rate:.0%}"
            yield f"{speed.flops / speed.seconds / self.machine.matrix_rate:.0%}"
