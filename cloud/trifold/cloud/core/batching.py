"""Batching: which rows of which sessions are computed next, as a pure function."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

BUDGET: Final = 128
"""Rows of a batch: more would hold up tokens, and engines gain little by them."""

FEW_ROWS: Final = 8
"""A step of so many rows is a token, perhaps with drafts; one of more is of a prompt."""

_FOR_PROMPTS: Final = 4
"""Part of the budget that tokens leave to prompts, where there are any: a quarter."""


@dataclass(frozen=True)
class Waiting:
    """What is left of a session's next step: so many `rows`."""

    key: Hashable
    tenant: str
    rows: int


def plan(waiting: Sequence[Waiting], budget: int) -> dict[Hashable, int]:
    """How many rows each session gets in the next batch, `budget` at most in all; none for who is not in it.

    `waiting` is in order of turns: who had one goes to its end. Tenants come in turn, and a tenant's sessions
    in theirs. Tokens go first, whole; prompts get what is left, and are cut to fit, so that a token waits
    for one batch and no more, however long a prompt is. Some of the budget is for prompts alone: tokens of
    many sessions do not keep them waiting for ever.
    """
    tokens = [*_by_tenant(one for one in waiting if one.rows <= FEW_ROWS)]
    prompts = [*_by_tenant(one for one in waiting if one.rows > FEW_ROWS)]
    rows: dict[Hashable, int] = {}
    left = budget - budget // _FOR_PROMPTS if prompts else budget
    for token in tokens:
        if token.rows <= left:
            rows[token.key] = token.rows
            left -= token.rows
    left = budget - sum(rows.values())
    for prompt in prompts:
        if left:
            rows[prompt.key] = min(prompt.rows, left)
            left -= rows[prompt.key]
    if waiting and not rows:
        # Not even a token's drafts fit such a budget.
        rows[waiting[0].key] = min(waiting[0].rows, budget)
    return rows


def _by_tenant(waiting: Iterable[Waiting]) -> Iterator[Waiting]:
    """One of each tenant, and again one of each, as long as there are any.

    Whoever had a turn just now stands at the end, so the tenant whose last session stands furthest ahead has
    waited for the longest time.
    """
    tenants: dict[str, deque[Waiting]] = {}
    for one in waiting:
        own = tenants.pop(one.tenant, deque())
        own.append(one)
        tenants[one.tenant] = own
    while tenants:
        for tenant, own in [*tenants.items()]:
            yield own.popleft()
            if not own:
                del tenants[tenant]
