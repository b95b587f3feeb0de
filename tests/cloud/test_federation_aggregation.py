from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.cloud.federations import INITIAL, drawn, equal
from trifold.cloud.federation.aggregation import refactored_mean
from trifold.cloud.federation.settings import STRATEGIES, RunSettings, StrategyName
from trifold.cloud.federation.strategy import Aggregator
from trifold.shared.errors import ConfigError
from trifold.shared.federation.packing import Arrays

A, B = "m.q_proj.lora_A", "m.q_proj.lora_B"


def product(factors: Arrays) -> Any:
    return factors[B].astype(np.float64) @ factors[A]


def aggregator(**settings: Any) -> Aggregator:
    return Aggregator(RunSettings.checked(settings))


def updates(*seeds: int) -> dict[str, Arrays]:
    return {f"site-{seed}": drawn(seed) for seed in seeds}


def test_svd_gives_the_best_adapter_of_its_rank() -> None:
    sites = [drawn(seed) for seed in (1, 2, 3)]
    mean = sum(product(site) for site in sites) / 3
    u, singular, vt = np.linalg.svd(mean)
    best = (u[:, :4] * singular[:4]) @ vt[:4]
    found = refactored_mean(INITIAL, sites)
    assert found[A].shape == INITIAL[A].shape
    assert np.allclose(product(found), best, atol=1e-5)
    factorwise = {name: np.mean([site[name] for site in sites], 0) for name in INITIAL}
    assert np.linalg.norm(product(found) - mean) < 0.8 * np.linalg.norm(product(factorwise) - mean)


def test_svd_leaves_factors_that_all_sites_share_where_they_are() -> None:
    rows = np.linalg.qr(INITIAL[A].T)[0].T.astype(np.float32)
    same = {A: rows, B: INITIAL[B]}
    found = refactored_mean(same, [same, same])
    assert np.allclose(found[A], rows, atol=1e-5)
    assert np.allclose(found[B], same[B], atol=1e-5)


def test_svd_keeps_directions_that_are_not_used_yet() -> None:
    fresh = {A: INITIAL[A], B: np.zeros_like(INITIAL[B])}
    found = refactored_mean(fresh, [fresh, fresh])
    assert not found[B].any()
    assert (np.linalg.norm(found[A], axis=1) > 1).all()


@pytest.mark.parametrize(("outputs", "inputs"), [(3, 24), (16, 2)])
def test_svd_takes_a_rank_above_a_side_of_the_projection(outputs: int, inputs: int) -> None:
    rng = np.random.default_rng(0)
    sites = [
        {
            A: rng.standard_normal((4, inputs)).astype(np.float32),
            B: rng.standard_normal((outputs, 4)).astype(np.float32),
        }
        for _ in range(2)
    ]
    found = refactored_mean(sites[0], sites)
    assert (found[A].shape, found[B].shape) == ((4, inputs), (outputs, 4))
    assert np.allclose(product(found), sum(product(site) for site in sites) / 2, atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_goes_on_where_its_state_was_kept(strategy: StrategyName) -> None:
    first, second = aggregator(strategy=strategy), aggregator(strategy=strategy)
    factors = first.aggregate(1, INITIAL, updates(1, 2, 3, 4, 5))
    second.restore(first.state())
    assert equal(
        first.aggregate(2, factors, updates(6, 7, 8)), second.aggregate(2, factors, updates(6, 7, 8))
    )
    assert equal(first.state(), second.state())
    assert all(array.dtype == np.float32 for array in factors.values())


@pytest.mark.parametrize("strategy", ["fedadam", "fedyogi", "fedavgm"])
def test_the_state_of_a_server_optimizer_matters(strategy: StrategyName) -> None:
    first, forgetful = aggregator(strategy=strategy), aggregator(strategy=strategy)
    factors = first.aggregate(1, INITIAL, updates(1, 2))
    assert not equal(first.aggregate(2, factors, updates(3)), forgetful.aggregate(2, factors, updates(3)))


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedmedian", "trimmed-mean", "krum"])
def test_strategies_without_an_optimizer_take_an_update_on_which_all_agree(strategy: StrategyName) -> None:
    agreed = {f"site-{number}": drawn(9) for number in range(5)}
    after = aggregator(strategy=strategy).aggregate(1, INITIAL, agreed)
    assert all(np.allclose(after[name], INITIAL[name] + drawn(9)[name], atol=1e-5) for name in INITIAL)


def test_krum_takes_the_mean_of_all_updates_but_one_of_flipped_sign() -> None:
    rng = np.random.default_rng(0)
    updates = {
        f"site-{number}": {
            name: array + rng.standard_normal(array.shape).astype(np.float32)
            for name, array in drawn(9).items()
        }
        for number in range(5)
    }
    honest = {site: update for site, update in updates.items() if site != "site-2"}
    flipped = honest | {"site-2": {name: -array for name, array in updates["site-2"].items()}}
    after = aggregator(strategy="krum").aggregate(1, INITIAL, flipped)
    mean = aggregator().aggregate(1, INITIAL, honest)
    assert all(np.allclose(after[name], mean[name], atol=1e-6) for name in INITIAL)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("trimmed-mean", {"beta": 0.25}), ("fedmedian", {}), ("krum", {"num_malicious_nodes": 2})],
)
def test_a_robust_strategy_stays_near_the_honest_sites(strategy: str, options: dict[str, float]) -> None:
    rng = np.random.default_rng(0)
    honest = {
        f"honest-{number}": {name: array + 0.1 * rng.standard_normal(array.shape).astype(np.float32)}
        for number in range(8)
        for name, array in drawn(9).items()
        if name == B
    }
    turned = {f"villain-{number}": {B: -5 * drawn(9)[B]} for number in range(2)}
    after = aggregator(strategy=strategy, options=options).aggregate(1, INITIAL, honest | turned)
    plain = aggregator().aggregate(1, INITIAL, honest | turned)
    wanted = INITIAL[B] + drawn(9)[B]
    assert np.linalg.norm(after[B] - wanted) < 0.2 * np.linalg.norm(plain[B] - wanted)


def test_a_factor_that_is_not_trained_stays(tmp_path: object) -> None:
    after = aggregator().aggregate(1, INITIAL, {"site": {B: drawn(1)[B]}})
    assert after[A].tobytes() == INITIAL[A].tobytes()


def test_the_order_in_which_sites_answer_changes_no_bit() -> None:
    given = updates(1, 2, 3)
    turned = dict(reversed(given.items()))
    assert equal(aggregator().aggregate(1, INITIAL, given), aggregator().aggregate(1, INITIAL, turned))


def test_fedprox_tells_sites_its_mu_and_the_others_none() -> None:
    assert aggregator(strategy="fedprox", options={"proximal_mu": 0.3}).proximal == 0.3
    assert aggregator().proximal == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "fedadam", "options": {"etta": 1}}, "fedadam has no option etta: it has eta, "),
        ({"options": {"beta": 1}}, "fedavg has no option beta: it has none"),
        ({"strategy": "trimmed-mean", "options": {"beta": 0.7}}, "trimmed-mean: .*range"),
        ({"strategy": "krum", "aggregation": "svd"}, "the strategy krum has none"),
        ({"aggregation": "svd", "lora": {"freeze_a": True}}, "exact already"),
        ({"quorum": 9}, "quorum of 9 is more than the 2 sites"),
        ({"rounds": 0}, "rounds: .*greater than or equal to 1"),
        ({"lora": {"tiers": ["cloud"]}}, r"lora\.tiers\.0: .*'edge' or 'device'"),
        ({"local": {"stepz": 1}}, r"local\.stepz"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        aggregator(**settings)
