from __future__ import annotations

from pathlib import Path

import pytest

from trifold.shared.cli.reference import errors, filled, metrics, settings
from trifold.shared.errors import ERRORS
from trifold.shared.settings import SETTINGS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("page", "table"),
    [("configuration.md", settings()), ("sdk.md", errors()), ("observability.md", metrics())],
)
def test_a_committed_table_is_current(page: str, table: str) -> None:
    committed = (DOCS / page).read_text(encoding="utf-8")
    assert table in committed, f"run `python -m trifold.shared.cli.reference docs/{page}`"
    assert filled(committed) == committed


def test_a_table_that_is_out_of_date_is_replaced_and_nothing_else_is() -> None:
    page = "Before.\n<!-- errors -->\nold\n<!-- /errors -->\nAfter.\n"
    assert filled(page) == page.replace("old\n", errors())


def test_the_tables_have_a_row_for_everything() -> None:
    assert errors().count("\n") == 2 + len(ERRORS)
    assert settings().count("\n") == 2 + sum(len(tier.model_fields) for tier in SETTINGS)
