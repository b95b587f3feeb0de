"""A waterfall: where the time and the bytes of a token went, from the device to the cloud and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from trifold.device.client.trace import TierTime, Trace


@dataclass(frozen=True)
class Span:
    """One stretch of a token's way. Times are means in milliseconds, bytes are means per token."""

    where: str
    what: str
    milliseconds: float
    bytes_up: float | None = None
    bytes_down: float | None = None


@dataclass(frozen=True)
class Waterfall:
    """The mean of some traces, as spans in the order in which a token passes them.

    A link's time is what neither of its ends accounts for, up and down together.
    """

    tokens: int
    milliseconds: float
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, traces: Sequence[Trace]) -> Waterfall:
        """The mean over at least one trace, all of them of the same tiers."""
        count = len(traces)

        def mean(values: Sequence[int]) -> float:
            return sum(values) / count

        spans = []
        device, *others = (list(tier) for tier in zip(*(trace.tiers for trace in traces), strict=True))
        links = [list(link) for link in zip(*(trace.links for trace in traces), strict=True)]
        for link, tier in zip(links, others, strict=True):
            network = mean([use.network_ns for use in link]) / 1e6
            up, down = mean([use.bytes_up for use in link]), mean([use.bytes_down for use in link])
            spans.append(Span(link[0].link, "network", network, up, down))
            spans.append(Span(tier[0].tier, "queue", mean([t.queue_ns for t in tier]) / 1e6))
            reused = round(mean([t.reused for t in tier]))
            what = _compute(tier[0]) + (f", {reused} reused" if reused else "")
            spans.append(Span(tier[0].tier, what, mean([t.compute_ns for t in tier]) / 1e6))
        spans.append(Span("device", _compute(device[0]), mean([t.compute_ns for t in device]) / 1e6))
        return cls(count, mean([trace.total_ns for trace in traces]) / 1e6, tuple(spans))

    def table(self, title: str, width: int = 28) -> Table:
        """The waterfall as a table, `width` characters for the whole time."""
        scale = width / max(sum(span.milliseconds for span in self.spans), 1e-9)
        table = Table(title=f"{title}: {self.milliseconds:.2f} ms", title_justify="left", box=None)
        for heading in ("where", "what"):
            table.add_column(heading, no_wrap=True)
        for heading in ("ms", "B up", "B down"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("", width=width, no_wrap=True)
        passed = 0.0
        for span in self.spans:
            start, end = round(passed * scale), round((passed + span.milliseconds) * scale)
            passed += span.milliseconds
            colour = "yellow" if span.bytes_up is not None else "cyan"
            bar = " " * start + f"[{colour}]{'█' * (end - start) or '▏'}[/]"
            sizes = ["" if size is None else f"{size:,.0f}" for size in (span.bytes_up, span.bytes_down)]
            table.add_row(span.where, span.what, f"{span.milliseconds:.2f}", *sizes, bar)
        return table

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def tables(traces: Sequence[Trace]) -> Iterator[Table]:
    """The waterfall of the first token of a generation and, where there are others, the mean of theirs."""
    first, *others = traces
    yield Waterfall.of([first]).table(f"The first token, after {first.rows} tokens")
    if others:
        yield Waterfall.of(others).table(f"Every other token, mean of {len(others)}")


def _compute(tier: TierTime) -> str:
    return f"compute, {tier.provider.removesuffix('ExecutionProvider')}"
