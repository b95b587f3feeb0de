"""What an examination has found, for people and for machines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Final

from rich.table import Table
from rich.text import Text

from trifold.edge.doctor.finding import Finding, Verdict

Findings = list[tuple[str, Finding]]
"""Each with the name of its check."""

_STYLES: Final[dict[Verdict, str]] = {
    "ok": "green",
    "warning": "yellow",
    "fault": "bold red",
    "skipped": "dim",
}


def healthy(findings: Findings) -> bool:
    """Whether there is no fault."""
    return not any(finding.verdict == "fault" for _, finding in findings)


def table(findings: Findings) -> Table:
    """A line for each finding, and below it what to do."""
    drawn = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(2):
        drawn.add_column(no_wrap=True)
    drawn.add_column(overflow="fold")
    before = ""
    for name, finding in findings:
        told = Text(finding.detail, "dim" if finding.verdict == "skipped" else "")
        if finding.remedy:
            told.append(f"\n→ {finding.remedy}", "bold")
        drawn.add_row("" if name == before else name, Text(finding.verdict, _STYLES[finding.verdict]), told)
        before = name
    return drawn


def summary(findings: Findings) -> str:
    counts = {verdict: _count(verdict, findings) for verdict in ("fault", "warning", "skipped")}
    if not any(counts.values()):
        return "all is well"
    told = [
        f"{count} {verdict}{'s' * (count > 1 and verdict != 'skipped')}"
        for verdict, count in counts.items()
        if count
    ]
    return ", ".join(told)


def as_json(findings: Findings) -> str:
    """`{"healthy": …, "findings": [{"check", "verdict", "detail", "remedy"}, …]}`."""
    listed = [{"check": name, **asdict(finding)} for name, finding in findings]
    return json.dumps({"healthy": healthy(findings), "findings": listed}, indent=2, ensure_ascii=False)


def _count(verdict: str, findings: Iterable[tuple[str, Finding]]) -> int:
    return sum(finding.verdict == verdict for _, finding in findings)
