"""Which rows are computed next: whatever waits, the plan keeps its promises."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trifold.cloud.core.batching import FEW_ROWS, Waiting, plan

BUDGET = 128


def tokens(tenant: str, count: int, first: int = 0) -> list[Waiting]:
    return [Waiting(f"{tenant} token {first + number}", tenant, 1) for number in range(count)]


def prompt(tenant: str, rows: int, number: int = 0) -> Waiting:
    return Waiting(f"{tenant} prompt {number}", tenant, rows)


def test_one_who_is_alone_is_computed_at_once() -> None:
    assert plan(tokens("a", 1), BUDGET) == {"a token 0": 1}
    assert plan([prompt("a", 500)], BUDGET) == {"a prompt 0": BUDGET}


def test_tokens_of_all_sessions_go_together_and_a_prompt_fills_what_they_leave() -> None:
    planned = plan([prompt("a", 500), *tokens("a", 20)], BUDGET)
    assert planned.pop("a prompt 0") == BUDGET - 20
    assert planned == {f"a token {number}": 1 for number in range(20)}


def test_many_tokens_leave_a_quarter_of_the_budget_to_a_prompt() -> None:
    planned = plan([*tokens("a", 500), prompt("b", 500)], BUDGET)
    assert planned["b prompt 0"] == BUDGET // 4
    assert sum(planned.values()) == BUDGET


def test_what_a_short_prompt_leaves_is_not_kept_from_the_next_one() -> None:
    planned = plan([prompt("a", 20), prompt("a", 30, 1), prompt("a", 500, 2)], BUDGET)
    assert planned == {"a prompt 0": 20, "a prompt 1": 30, "a prompt 2": BUDGET - 50}


def test_drafts_are_not_cut() -> None:
    waiting = [Waiting(number, "a", FEW_ROWS) for number in range(3)]
    assert plan(waiting, 2 * FEW_ROWS + 1) == {0: FEW_ROWS, 1: FEW_ROWS}


def test_a_tenant_with_one_session_does_not_wait_behind_one_with_many() -> None:
    planned = plan([*tokens("many", 1000), *tokens("one", 1)], BUDGET)
    assert "one token 0" in planned
    assert sum(planned.values()) == BUDGET
    prompts = plan([prompt("many", 100, number) for number in range(9)] + [prompt("one", 100)], BUDGET)
    assert prompts == {"many prompt 0": 100, "one prompt 0": 28}


def test_a_tenant_with_one_prompt_has_the_next_turn_after_one_with_many() -> None:
    first = [prompt("many", 500, number) for number in range(10)] + [prompt("one", 500)]
    assert plan(first, BUDGET) == {"many prompt 0": BUDGET}
    then = [*first[1:], prompt("many", 500 - BUDGET)]
    assert plan(then, BUDGET) == {"one prompt 0": BUDGET}


def test_no_budget_is_too_small_for_anything_at_all() -> None:
    assert plan([Waiting("drafts", "a", FEW_ROWS)], FEW_ROWS - 1) == {"drafts": FEW_ROWS - 1}


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 600)), min_size=1, max_size=60),
    st.integers(4 * FEW_ROWS, 512),
)
def test_no_plan_is_empty_or_beyond_its_budget_or_gives_more_than_there_is(
    steps: list[tuple[str, int]], budget: int
) -> None:
    waiting = [Waiting(number, tenant, rows) for number, (tenant, rows) in enumerate(steps)]
    planned = plan(waiting, budget)
    assert 0 < sum(planned.values()) <= budget
    for one in waiting:
        given_rows = planned.get(one.key, 0)
        assert 0 <= given_rows <= one.rows
        assert one.rows > FEW_ROWS or given_rows in (0, one.rows)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 600)), min_size=1, max_size=60),
    st.integers(4 * FEW_ROWS, 512),
)
def test_everything_that_waits_is_computed_in_the_end(steps: list[tuple[str, int]], budget: int) -> None:
    """As the scheduler does it: whoever had a turn goes to the end, with what is left."""
    line = {number: (tenant, rows) for number, (tenant, rows) in enumerate(steps)}
    turns = 0
    while line:
        planned = plan([Waiting(key, tenant, rows) for key, (tenant, rows) in line.items()], budget)
        for key, rows in planned.items():
            tenant, left = line.pop(key)  # type: ignore[call-overload]
            if left > rows:
                line[key] = tenant, left - rows  # type: ignore[index]
        turns += 1
    assert turns <= len(steps) + sum(rows for _, rows in steps) // (budget // 4) + 1
