"""A completion of the demo: what came, how fast, and where its time went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from trifold.device.client.generation import Chunk
from trifold.device.client.trace import Trace
from trifold.device.commands.waterfall import Waterfall, tables


@dataclass(frozen=True)
class Completion:
    """The chunks that continued a prompt, and the seconds it took."""

    prompt: str
    chunks: Sequence[Chunk]
    seconds: float

    @property
    def traces(self) -> list[Trace]:
        return [chunk.trace for chunk in self.chunks if chunk.trace]

    @property
    def tokens_per_second(self) -> float | None:
        """None where a single token came: that is no rate."""
        tokens = len(self.traces)
        return tokens / self.seconds if tokens > 1 else None

    def as_dict(self) -> dict[str, Any]:
        first, *others = self.traces
        return {
            "prompt": self.prompt,
            "text": "".join(chunk.text for chunk in self.chunks),
            "token_ids": [token for chunk in self.chunks for token in chunk.token_ids],
            "finish_reason": self.chunks[-1].finish_reason,
            "tokens_per_second": self.tokens_per_second,
            "exact": first.exact,
            "first_token": Waterfall.of([first]).as_dict(),
            "token": Waterfall.of(others).as_dict() if others else None,
        }

    def print(self, console: Console) -> None:
        """The waterfalls, and a line to sum up."""
        for table in tables(self.traces):
            console.print()
            console.print(table)
        exact = self.traces[0].exact
        verdict = "the same bits as the unsplit model" if exact else "not exact on this processor"
        rate = self.tokens_per_second
        tokens = f"{len(self.traces)} tokens, {rate:.0f} a second" if rate else "1 token; the model stopped"
        console.print(f"\n{tokens}; {verdict}.")
