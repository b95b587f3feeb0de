"""Parity: the split model in fp32 against transformers in fp32, for every family."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.cloud.parities import CASES, DECODE, FEATURES, PREFILL, Parity, measure

Measured = Callable[[str, str], Parity]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Measures a configuration once, whoever asks."""

    @cache
    def once(family: str, name: str) -> Parity:
        return measure(family, name, Path(tmp_path_factory.mktemp(family)))

    return once


@pytest.mark.parametrize(("family", "name"), CASES)
def test_logits_are_those_of_transformers_in_prefill_and_decode(
    measured: Measured, family: str, name: str
) -> None:
    assert measured(family, name).worst < 1e-4


def test_positions_where_two_experts_tie_are_at_most_one_in_a_thousand(measured: Measured) -> None:
    ties = {case: measured(*case).ties for case in CASES}
    for family in FEATURES:
        worst = max(measured(*case).worst for case in CASES if case[0] == family)
        print(f"{family}: worst relative error {worst:.1e} in {len(FEATURES[family])} configurations")
    print("ties:", {case: positions for case, positions in ties.items() if positions})
    assert sum(map(len, ties.values())) <= len(CASES) * (PREFILL + DECODE) / 1000
