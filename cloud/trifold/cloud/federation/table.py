"""What a run has done so far, as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Self

from rich.console import Group
from rich.table import Table
from rich.text import Text

from trifold.cloud.federation.metrics import Event

_UP = ("update_up", "rows_up", "gradients_up")
_DOWN = ("update_down", "rows_down", "gradients_down")

_TITLE = "Held-out loss of each site in nats, with the factors that a round began with"

_SHOWN = 12
"""Rounds in a table that fits a screen."""

_COLUMNS = 6
"""Sites with a column each; of more, the least, mean and most are shown."""

_NAMED = 4
"""Refused or lost sites of a round that are named; the log has all."""


@dataclass
class Progress:
    """The events of a run, put together."""

    rounds: dict[int, Event] = field(default_factory=dict)
    evaluation: Event | None = None
    asked: Event | None = None
    answered: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    begun: int = 0
    ended: bool = False
    failed: str = ""

    @classmethod
    def of(cls, events: Iterable[Event]) -> Self:
        progress = cls()
        for event in events:
            progress._take(event)
        return progress

    def _take(self, event: Event) -> None:
        match event.get("event"):
            case "begin":
                self.begun += 1
                self.ended, self.failed, self.asked = False, "", None
            case "asked":
                self.asked, self.answered = event, []
            case "answer":
                self.answered.append(event["site"])
            case "refused" | "lost" as what:
                self.notes.append(
                    f"round {event.get('round', '–')}: {event['site']} {what}: {event['reason']}"
                )
            case "round":
                self.rounds[event["round"]] = event
                self.asked = None
            case "evaluation":
                self.evaluation = event
            case "end":
                self.ended = True
            case "failed":
                self.failed = event["reason"]

    def render(self, rounds: int, *, at_work: bool) -> Group:
        """The table, with a line on what happens now, and who was refused or lost.

        `at_work` says whether a ServerApp works on the run.
        """
        sites = sorted({site for row in self.rounds.values() for site in row["sites"]})
        if len(sites) > _COLUMNS:
            sites = []
        losses = sites or ["best", "mean", "worst"]
        table = Table(title=_TITLE, title_justify="left")
        # Most runs lose nobody, and a terminal has 80 columns.
        missing = [what for what in ("refused", "lost") if any(row[what] for row in self.rounds.values())]
        for heading in ("round", *losses, "MB up", "MB down", "seconds", "overhead", *missing):
            table.add_column(heading, justify="right", no_wrap=heading not in missing)
        for number, row in sorted(self.rounds.items())[-_SHOWN:]:
            names = [_names(row[what]) for what in missing]
            table.add_row(str(number), *_losses(row, sites), *_cells(row), *names)
        if self.evaluation:
            table.add_row("after", *_losses(self.evaluation, sites))
        return Group(
            table, self._now(rounds, at_work), *(Text(note, style="yellow") for note in self.notes[-5:])
        )

    def _now(self, rounds: int, at_work: bool) -> Text:
        if self.failed:
            return Text(f"failed: {self.failed}", style="red")
        if self.ended:
            return Text(f"{len(self.rounds)} of {rounds} rounds done", style="green")
        if self.begun and not at_work:
            return Text("the ServerApp was lost: resume the run", style="red")
        if self.asked:
            waiting = _names(sorted(set(self.asked["sites"]) - set(self.answered)))
            return Text(f"round {self.asked['round']} of {rounds}: waiting for {waiting}")
        return Text("waiting for sites" if self.begun else "waiting for flower-superexec to start the run")


def _losses(row: Event, sites: list[str]) -> list[str]:
    """Of each site, or without sites the least, the mean and the most of all."""
    known = {site: report["heldout"] for site, report in row["sites"].items() if "heldout" in report}
    if sites or not known:
        return [_nats(known.get(site)) for site in sites]
    losses = sorted(known.values())
    return [_nats(loss) for loss in (losses[0], fmean(losses), losses[-1])]


def _cells(row: Event) -> list[str]:
    reports = row["sites"]
    return [
        f"{_total(reports, _UP) / 1e6:.2f}",
        f"{_total(reports, _DOWN) / 1e6:.2f}",
        f"{row['seconds']:.1f}",
        f"{row['overhead']:.1f}",
    ]


def _total(reports: dict[str, dict[str, Any]], names: Iterable[str]) -> int:
    return sum(int(report.get(name, 0)) for name in names for report in reports.values())


def _names(sites: Iterable[str]) -> str:
    names = list(sites)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more or "–"


def _nats(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.3f}"
