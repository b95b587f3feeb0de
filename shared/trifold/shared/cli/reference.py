"""Tables of the documentation that the code is the source of.

`python -m trifold.shared.cli.reference PAGE` writes them into a page, each between its marks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from trifold.shared.errors import ERRORS
from trifold.shared.settings import SETTINGS
from trifold.shared.telemetry.metrics import described


def settings() -> str:
    """Every setting of the tiers, in Markdown."""
    return _table(
        ("TOML", "Flag", "Variable", "Default", "Meaning"),
        (
            (
                f"`[{tier.section}] {name}`",
                f"`{tier.spelling(name)}`",
                f"`{tier.variable(name)}`",
                tier.default_of(name),
                field.description or "",
            )
            for tier in SETTINGS
            for name, field in tier.model_fields.items()
        ),
    )


def errors() -> str:
    """Every class of error, in Markdown."""
    return _table(
        ("Class", "Reason", "gRPC", "Exit code", "Meaning"),
        (
            (
                f"`{error.__name__}`",
                f"`{reason}`",
                f"`{error.grpc_status.name}`",
                str(error.exit_code),
                " ".join((error.__doc__ or "").partition("\n\n")[0].split()),
            )
            for reason, error in ERRORS.items()
        ),
    )


def metrics() -> str:
    """Every metric, in Markdown."""
    return _table(
        ("Metric", "Kind", "Labels", "Meaning"),
        (
            (f"`{each.name}`", each.kind, ", ".join(f"`{label}`" for label in each.labels), each.text)
            for each in described()
        ),
    )


TABLES: Final[dict[str, Callable[[], str]]] = {"settings": settings, "errors": errors, "metrics": metrics}


def filled(page: str) -> str:
    """The page with the tables that it has marks for, as they are now."""
    for name, table in TABLES.items():
        before, mark, rest = page.partition(f"<!-- {name} -->\n")
        if mark:
            _, end, after = rest.partition(f"<!-- /{name} -->")
            page = before + mark + table() + end + after
    return page


def _table(heading: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heading, ("---",) * len(heading), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
