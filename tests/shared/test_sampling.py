from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from trifold.shared.errors import BadRows, InvalidRequest
from trifold.shared.runtime.sampling import Sampling, logprobs, pick

LOGITS = np.array([1.0, 3.0, -2.0, 2.5, 0.0, 3.0, -0.5, 1.5], np.float32)


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = np.exp(scores - scores.max())
    shares /= shares.sum()
    return shares


def counts(logits: NDArray[np.float32], sampling: Sampling, draws: int = 20_000) -> NDArray[np.int64]:
    tokens = [pick(logits, sampling, position) for position in range(draws)]
    return np.bincount(tokens, minlength=len(logits))


def chi_square(observed: NDArray[np.int64], shares: NDArray[np.float64]) -> float:
    expected = shares * observed.sum()
    return float((((observed - expected) ** 2)[expected > 0] / expected[expected > 0]).sum())


def surely_not_chance(freedom: int) -> float:
    """A chi-square that chance exceeds about once in 100,000 (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * freedom)
    return float(freedom * (1 - spread + 4.3 * math.sqrt(spread)) ** 3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_follow_the_softmax_of_the_logits_over_positions(temperature: float) -> None:
    observed = counts(LOGITS, Sampling(temperature=temperature, seed=11))
    assert chi_square(observed, softmax(LOGITS.astype(np.float64) / temperature)) < surely_not_chance(7)


def test_tokens_follow_the_softmax_over_seeds_too() -> None:
    tokens = [pick(LOGITS, Sampling(temperature=1.0, seed=seed), 5) for seed in range(20_000)]
    shares = softmax(LOGITS.astype(np.float64))
    assert chi_square(np.bincount(tokens, minlength=8), shares) < surely_not_chance(7)


def test_tokens_at_neighbouring_positions_are_independent() -> None:
    tokens = np.array(
        [pick(LOGITS, Sampling(temperature=1.0, seed=3), position) for position in range(20_001)]
    )
    shares = softmax(LOGITS.astype(np.float64))
    pairs = np.bincount(tokens[:-1] * 8 + tokens[1:], minlength=64)
    assert chi_square(pairs, np.outer(shares, shares).ravel()) < surely_not_chance(63)


def test_top_k_keeps_the_largest_and_their_proportions() -> None:
    observed = counts(LOGITS, Sampling(temperature=1.0, top_k=3, seed=1))
    shares = np.where(LOGITS >= 2.5, np.exp(LOGITS.astype(np.float64)), 0.0)
    assert set(np.flatnonzero(observed)) == {1, 3, 5}
    assert chi_square(observed, shares / shares.sum()) < surely_not_chance(2)


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    shares = np.array([0.05, 0.4, 0.3, 0.15, 0.1])
    logits = np.log(shares).astype(np.float32)
    for top_p, kept in (
        (0.39, {1}),
        (0.69, {1, 2}),
        (0.71, {1, 2, 3}),
        (0.94, {1, 2, 3, 4}),
        (1.0, set(range(5))),
    ):
        observed = counts(logits, Sampling(temperature=1.0, top_p=top_p, seed=2), draws=3_000)
        assert set(np.flatnonzero(observed)) == kept, top_p


def test_top_p_looks_at_what_temperature_and_top_k_have_left() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1])).astype(np.float32)
    # Of the two that top_k leaves the first has 4/7 = 0.571, which reaches 0.56 alone; of all it has 0.4.
    assert set(np.flatnonzero(counts(logits, Sampling(1.0, 2, 0.56), 2_000))) == {0}
    # Sharpened by temperature 0.5 the first has 16/30 = 0.533.
    assert set(np.flatnonzero(counts(logits, Sampling(0.5, 0, 0.52), 2_000))) == {0}


def test_greedy_takes_the_lowest_of_equal_tokens_and_so_does_top_k_1() -> None:
    assert pick(LOGITS, Sampling(), 0) == 1
    assert all(
        pick(LOGITS, Sampling(temperature=1.0, top_k=1, seed=4), position) == 1 for position in range(50)
    )


def test_a_tiny_temperature_is_as_good_as_greedy() -> None:
    logits = np.array([1.0, 3.0, 2.9], np.float32)
    assert pick(logits, Sampling(temperature=1e-300), 0) == 1


@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=60),
    temperature=st.floats(0, 3),
    top_k=st.integers(0, 70),
    top_p=st.floats(0.01, 1),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**32 - 1),
)
def test_a_token_depends_on_nothing_but_logits_parameters_seed_and_position(
    logits: list[float], temperature: float, top_k: int, top_p: float, seed: int, position: int
) -> None:
    sampling = Sampling(temperature, top_k, top_p, seed)
    row = np.array(logits, np.float32)
    token = pick(row, sampling, position)
    np.random.seed(0)  # whatever the global state is
    pick(row[::-1].copy(), sampling, position + 1)
    assert pick(row.copy(), sampling, position) == token
    assert 0 <= token < len(row)


def test_the_noise_is_pinned_so_that_a_new_numpy_cannot_change_old_texts() -> None:
    flat = np.zeros(4096, np.float32)
    tokens = [pick(flat, Sampling(temperature=1.0, seed=seed), 7) for seed in (0, 1, 2**63, 2**64 - 1)]
    assert tokens == [1154, 3233, 3606, 1603]


def test_a_masked_token_is_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0], np.float32)
    assert set(np.flatnonzero(counts(logits, Sampling(temperature=5.0, seed=9), 2_000))) == {1, 3}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_refused_by_position(value: float, temperature: float) -> None:
    with pytest.raises(BadRows, match="position 12"):
        pick(np.array([0.0, value], np.float32), Sampling(temperature), 12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name} is "):
        Sampling(**{name: value})  # type: ignore[arg-type]


def test_logprobs_are_of_the_model_itself_best_first() -> None:
    told = logprobs(LOGITS, 2, 3)
    expected = LOGITS.astype(np.float64)
    expected -= np.log(np.exp(expected).sum())
    assert told.token == pytest.approx(expected[2])
    assert [token for token, _ in told.top] == list(np.argsort(-expected, kind="stable")[:3])
    assert [value for _, value in told.top] == pytest.approx(sorted(expected, reverse=True)[:3])
    everything = logprobs(LOGITS, 0, len(LOGITS)).top
    assert sum(np.exp(value) for _, value in everything) == pytest.approx(1.0)


def test_the_logprobs_of_huge_logits_are_numbers() -> None:
    told = logprobs(np.array([3e38, -3e38], np.float32), 1, 2)
    assert told.top[0] == (0, 0.0)
    assert np.isfinite(told.token)
