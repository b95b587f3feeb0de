"""Finding: what a check has found, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "fault", "skipped"]


@dataclass(frozen=True)
class Finding:
    """`detail` says what is so, `remedy` what to do: a warning or fault without one takes its check's."""

    verdict: Verdict
    detail: str
    remedy: str = ""


def ok(detail: str) -> Finding:
    return Finding("ok", detail)


def warning(detail: str, remedy: str = "") -> Finding:
    """Something that serving goes on with, and that is not as it should be."""
    return Finding("warning", detail, remedy)


def fault(detail: str, remedy: str = "") -> Finding:
    """Something that this machine cannot serve with, or not for long."""
    return Finding("fault", detail, remedy)


def skipped(detail: str) -> Finding:
    """What was not looked at, and why."""
    return Finding("skipped", detail)
