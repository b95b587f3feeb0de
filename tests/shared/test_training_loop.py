"""Training at a site: steps, schedule, rounds, mixed precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, cycle, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.shared.sites import site, tokens, train_bundle, unsettle
from trifold.shared.bundle.manifest import Tier
from trifold.shared.errors import ConfigError, InvalidRequest
from trifold.shared.training.diverged import TrainingDiverged
from trifold.shared.training.lora import LoraSettings, factors
from trifold.shared.training.site import SiteModel
from trifold.shared.training.training import TrainSettings, evaluate, learning_rate, train

FAST = TrainSettings(steps=6, learning_rate=5e-3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bundle("deepseek_v3", tmp_path_factory.mktemp("nano"))[1]


def texts() -> Iterator[NDArray[np.int64]]:
    return (tokens(2, 12, seed) for seed in count())


def changed(first: SiteModel, second: SiteModel) -> list[str]:
    """Names of the factors that differ in any bit."""
    ours, theirs = factors(first.shards), factors(second.shards)
    return [name for name in ours if not np.array_equal(ours[name], theirs[name])]


def test_a_site_learns_its_text_and_leaves_the_weights_alone(bundle: Path) -> None:
    ours, text = site(bundle), tokens(4, 12)
    frozen = {name: weight.clone() for name, weight in ours.edge.state_dict().items() if "lora" not in name}
    before = evaluate(ours, [text])
    settings = TrainSettings(steps=12, learning_rate=1e-2)
    losses = train(ours, cycle([text]), settings)
    assert losses[0] == pytest.approx(before)
    assert len(losses) == 12
    assert evaluate(ours, [text]) < before - 0.5
    assert all(torch.equal(ours.edge.state_dict()[name], weight) for name, weight in frozen.items())


def test_training_twice_gives_the_same_bits(bundle: Path) -> None:
    first, second = site(bundle), site(bundle)
    assert train(first, texts(), FAST) == train(second, texts(), FAST)
    assert not changed(first, second)


def test_checkpointing_changes_no_bit(bundle: Path) -> None:
    plain, thrifty = site(bundle), site(bundle)
    settings = replace(FAST, precision="bf16")
    losses = train(plain, texts(), settings)
    assert losses == train(thrifty, texts(), replace(settings, checkpointing=True))
    assert not changed(plain, thrifty)
    assert [shard.checkpointing for shard in thrifty.shards] == [True, True]
    train(thrifty, texts(), settings)
    assert [shard.checkpointing for shard in thrifty.shards] == [False, False]


def test_the_learning_rate_climbs_and_falls_along_a_cosine() -> None:
    settings = TrainSettings(steps=10, learning_rate=2.0, total_steps=10, warmup=2)
    rates = [learning_rate(settings, step) for step in range(12)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[6] == pytest.approx(1.0)
    assert all(later < earlier for earlier, later in pairwise(rates[2:11]))
    assert rates[10:] == [0.0, 0.0]
    assert learning_rate(replace(settings, steps=3, offset=4), 2) == rates[6]


def test_accumulated_batches_count_as_one_large_batch(bundle: Path) -> None:
    large, small = site(bundle), site(bundle)
    pairs = [(tokens(2, 12, seed), tokens(2, 12, seed + 100)) for seed in range(3)]
    settings = replace(FAST, steps=3)
    losses = train(large, (np.concatenate(pair) for pair in pairs), settings)
    again = train(small, (batch for pair in pairs for batch in pair), replace(settings, accumulate=2))
    assert losses == pytest.approx(again, rel=1e-4)


def test_a_proximal_term_holds_the_factors_where_they_were(bundle: Path) -> None:
    moved = []
    for proximal in (0.0, 100.0):
        ours = site(bundle)
        unsettle(ours)
        start = factors(ours.shards)
        train(ours, texts(), replace(FAST, proximal=proximal, clip=1e9))
        end = factors(ours.shards)
        moved.append(sum(float(np.square(end[name] - start[name]).sum()) for name in start))
    assert moved[1] < moved[0] / 2


def test_gradients_are_cut_to_the_given_norm(bundle: Path) -> None:
    ours = site(bundle)
    unsettle(ours)
    train(ours, texts(), replace(FAST, steps=1, clip=1e-3))
    norms = [float(weight.grad.norm()) for weight in ours.parameters() if weight.grad is not None]
    assert np.linalg.norm(norms) == pytest.approx(1e-3, rel=1e-3)


def test_bfloat16_keeps_factors_in_fp32_and_learns_nearly_the_same(bundle: Path) -> None:
    exact, mixed = site(bundle), site(bundle)
    text = tokens(4, 12)
    settings = TrainSettings(steps=6, learning_rate=5e-3)
    train(exact, cycle([text]), settings)
    train(mixed, cycle([text]), replace(settings, precision="bf16"))
    assert changed(exact, mixed)
    assert {array.dtype for array in factors(mixed.shards).values()} == {np.dtype(np.float32)}
    assert evaluate(mixed, [text]) == pytest.approx(evaluate(exact, [text]), rel=0.02)


def test_evaluation_is_the_mean_over_tokens_and_changes_nothing(bundle: Path) -> None:
    ours = site(bundle)
    unsettle(ours)
    before = factors(ours.shards)
    one, many = tokens(1, 12, 1), tokens(3, 12, 2)
    expected = (evaluate(ours, [one]) + 3 * evaluate(ours, [many])) / 4
    assert evaluate(ours, [one, many]) == pytest.approx(expected)
    assert all(np.array_equal(before[name], array) for name, array in factors(ours.shards).items())


def test_a_training_that_diverges_says_so(bundle: Path) -> None:
    ours = site(bundle)
    with torch.no_grad():
        ours.device.get_parameter("head.weight")[:] = np.nan
    with pytest.raises(TrainingDiverged, match="loss is nan"):
        train(ours, texts(), FAST)


@pytest.mark.parametrize("tiers", [("edge", "device"), ("edge",), ("device",)])
def test_steps_that_are_far_too_long_are_told_with_what_to_do(bundle: Path, tiers: tuple[Tier, ...]) -> None:
    ours = site(bundle, LoraSettings(rank=4, tiers=tiers))
    with pytest.raises(TrainingDiverged, match="take a lower learning rate"):
        train(ours, texts(), replace(FAST, learning_rate=1e20))


def test_a_text_with_too_few_batches_is_refused(bundle: Path) -> None:
    with pytest.raises(InvalidRequest, match="fewer batches"):
        train(site(bundle), iter([tokens(1, 8)]), FAST)
    with pytest.raises(InvalidRequest, match="no text"):
        evaluate(site(bundle), [])


def test_a_site_with_nothing_to_train_is_refused(bundle: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        train(site(bundle, LoraSettings(tiers=())), texts(), FAST)
