"""The page of a run: its curves, bytes and refusals, in one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

from trifold.cloud.federation.metrics import Event
from trifold.cloud.federation.table import Progress

FILE: Final = "page.html"

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _RIGHT = 640, 260, 56, 28, 110

_COLOURS: Final = ("#2a6fbb", "#c2571a", "#2f8f4e", "#8a4fbf", "#b8860b", "#b03060", "#4a7c8c", "#6b6b2f")

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --line: #d9d9d9; --soft: #666 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #161616; --line: #3a3a3a; --soft: #a0a0a0 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin-top: 2rem }
svg { width: 100%; height: auto } svg text { font-size: 12px; fill: var(--soft) }
svg .grid { stroke: var(--line) } svg .curve { fill: none; stroke-width: 2 }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .2rem .7rem; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: normal }
"""

Curve = list[tuple[float, float]]


def page(name: str, events: Iterable[Event]) -> str:
    """The page of the run `name`: held-out loss of each site after each round, bytes, who was refused."""
    progress = Progress.of(events)
    rows = [row for _, row in sorted(progress.rounds.items())]
    sites = sorted({site for row in rows for site in row["sites"]})
    # A round tells the loss of the factors that it began with: those of the round before.
    losses = {site: _losses(rows, site) for site in sites}
    for site, report in (progress.evaluation or {"sites": {}})["sites"].items():
        if site in losses and "heldout" in report:
            losses[site].append((len(rows), report["heldout"]))
    volumes = {
        what: [(row["round"], _bytes(row, what) / 1e6) for row in rows]
        for what in ("rows", "gradients", "update")
    }
    title = f"Federated run {name}"
    return "\n".join(
        [
            "<!doctype html><meta charset=utf-8>",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style><h1>{escape(title)}</h1>",
            "<h2>Held-out loss of each site, nats a token, after each round</h2>",
            _chart(losses),
            "<h2>Megabytes of each round, up and down, all sites together</h2>",
            _chart({"updates" if what == "update" else what: curve for what, curve in volumes.items()}),
            "<h2>Rounds</h2>",
            _table(rows),
            *(f"<p>{escape(note)}</p>" for note in progress.notes),
        ]
    )


def _losses(rows: Sequence[Event], site: str) -> Curve:
    told = [(row["round"] - 1, row["sites"].get(site, {}).get("heldout")) for row in rows]
    return [(after, loss) for after, loss in told if loss is not None]


def _bytes(row: Event, what: str) -> int:
    return sum(
        int(report.get(f"{what}_{way}", 0)) for report in row["sites"].values() for way in ("up", "down")
    )


def _chart(curves: dict[str, Curve]) -> str:
    """An SVG of the curves, each named at its end."""
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return "<p>Nothing yet.</p>"
    right = max(1.0, *(x for x, _ in points))
    low, high = min(y for _, y in points), max(y for _, y in points)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (_WIDTH - _LEFT - _RIGHT) * x / right
        return across, 10 + (_HEIGHT - 10 - _BOTTOM) * (high - y) / (high - low)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">']
    for step in range(5):
        value = low + (high - low) * step / 4
        _, down = place(0, value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>'
        )
        parts.append(f'<text x="{_LEFT - 8}" y="{down + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    for x in range(0, round(right) + 1, max(1, round(right) // 8)):
        parts.append(f'<text x="{place(x, low)[0]:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{x}</text>')
    for number, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        line = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in curve)
        parts.append(f'<polyline class="curve" stroke="{colour}" points="{line}"/>')
        if curve:
            across, down = place(*curve[-1])
            style = f'style="fill: {colour}"'
            parts.append(f'<text x="{across + 6:.1f}" y="{down + 4:.1f}" {style}>{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _table(rows: Sequence[Event]) -> str:
    heads = ("round", "sites", "refused", "lost", "MB", "seconds", "overhead")
    lines = [f"<tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>"]
    for row in rows:
        volume = sum(_bytes(row, what) for what in ("rows", "gradients", "update")) / 1e6
        names = (", ".join(row[what]) or "–" for what in ("refused", "lost"))
        seconds = (f"{row[what]:.1f}" for what in ("seconds", "overhead"))
        cells = (row["round"], len(row["sites"]), *names, f"{volume:.2f}", *seconds)
        lines.append(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in cells)}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'
