"""LoRA on shards: where it goes, how it begins, how it is read and set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.checkpoints import SMALL
from tests.shared.sites import CUTS, floats, shard, site, tokens, train_bundle, unsettle
from trifold.shared.bundle.manifest import Cuts
from trifold.shared.errors import InvalidRequest
from trifold.shared.model.names import DenseNames, MoeNames
from trifold.shared.training.lora import LoraSettings, add_lora, factors, load_factors
from trifold.shared.training.slices import FloatSlice

MATRICES = ("_proj.weight", "_proj_with_mqa.weight")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bundle("deepseek_v3", tmp_path_factory.mktemp("nano"))[1]


def projections(weights: FloatSlice) -> set[str]:
    """Attention, dense and shared projections of a slice, by ModelSpec's names for its tensors."""
    found: set[str | None] = set()
    for index in weights.layers:
        layer = weights.names.layer(index)
        found |= set(vars(layer.attention).values())
        dense = layer.ffn.shared if isinstance(layer.ffn, MoeNames) else layer.ffn
        if isinstance(dense, DenseNames):
            found |= {dense.gate, dense.up, dense.down}
    return {name.removesuffix(".weight") for name in found if name and name.endswith(MATRICES)}


@pytest.mark.parametrize("family", SMALL)
def test_factors_are_on_attention_and_dense_projections_under_checkpoint_names(
    family: str, tmp_path: Path
) -> None:
    # Deep enough for peft to sum up the names of modules in its own way, as it does from twenty on.
    _, bundle = train_bundle(family, tmp_path, cuts=Cuts(edge=5, cloud=6), num_hidden_layers=7)
    ours = site(bundle)
    expected = projections(floats(bundle, "edge")) | projections(floats(bundle, "device"))
    assert set(factors(ours.shards)) == {f"{name}.lora_{part}" for name in expected for part in "AB"}
    for name, array in factors(ours.shards).items():
        weights = floats(bundle, "edge").tensors() | floats(bundle, "device").tensors()
        outputs, inputs = weights[name.rsplit(".", 1)[0] + ".weight"].shape
        assert array.shape == ((4, inputs) if name.endswith("A") else (outputs, 4))
        assert array.dtype == np.float32


def test_a_model_with_new_factors_is_the_model_without_them(bundle: Path) -> None:
    plain, trained = shard(bundle, "edge"), shard(bundle, "edge")
    add_lora(trained, LoraSettings())
    ids = torch.from_numpy(tokens(2, 9))
    assert torch.equal(plain(ids), trained(ids))


def test_factors_change_the_model_by_alpha_over_rank_of_their_product(bundle: Path) -> None:
    device = shard(bundle, "device")
    add_lora(device, LoraSettings(rank=4, alpha=6.0))
    name = f"model.layers.{CUTS.cloud}.self_attn.o_proj"
    module = device.get_submodule("model.layers.0.self_attn.o_proj")
    inputs = torch.randn(3, factors([device])[f"{name}.lora_A"].shape[1])
    before = module(inputs)
    rng = np.random.default_rng(0)
    given = {
        part: rng.normal(size=array.shape).astype(np.float32) for part, array in factors([device]).items()
    }
    load_factors([device], given)
    expected = 6 / 4 * inputs.numpy() @ given[f"{name}.lora_A"].T @ given[f"{name}.lora_B"].T
    assert np.allclose((module(inputs) - before).detach().numpy(), expected, atol=1e-4)


def test_the_first_factors_depend_on_seed_and_name_and_not_on_the_cuts(bundle: Path, tmp_path: Path) -> None:
    _, other = train_bundle("deepseek_v3", tmp_path, cuts=Cuts(edge=1, cloud=2))
    first, again = factors(site(bundle).shards), factors(site(other).shards)
    shared = first.keys() & again.keys()
    assert shared
    assert all(np.array_equal(first[name], again[name]) for name in shared)
    reseeded = factors(site(bundle, LoraSettings(rank=4, seed=1)).shards)
    assert not [name for name in first if name.endswith("A") and np.array_equal(first[name], reseeded[name])]
    assert len({array.tobytes() for name, array in first.items() if name.endswith("A")}) == len(first) // 2


def test_factors_can_be_read_and_set_again(bundle: Path) -> None:
    ours, theirs = site(bundle), site(bundle)
    unsettle(ours)
    load_factors(theirs.shards, factors(ours.shards))
    assert ours.loss(tokens(2, 8)).item() == theirs.loss(tokens(2, 8)).item()


def test_factors_that_were_read_do_not_change_with_the_training(bundle: Path) -> None:
    ours = site(bundle)
    read = factors(ours.shards)
    unsettle(ours)
    assert not any(array.any() for name, array in read.items() if name.endswith("B"))


@pytest.mark.parametrize("wrong", ["unknown", "shape"])
def test_factors_that_do_not_fit_are_refused_by_name_and_change_nothing(bundle: Path, wrong: str) -> None:
    ours = site(bundle)
    before = factors(ours.shards)
    given = {name: array + 1 for name, array in before.items()}
    last = max(given)
    if wrong == "unknown":
        given["model.layers.9.self_attn.o_proj.lora_A"] = given[last]
    else:
        given[last] = given[last].T
    with pytest.raises(InvalidRequest, match="lora_"):
        load_factors(ours.shards, given)
    after = factors(ours.shards)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_with_frozen_a_only_b_is_trained(bundle: Path) -> None:
    ours = site(bundle, LoraSettings(rank=4, freeze_a=True))
    assert len(ours.parameters()) == len(factors(ours.shards)) // 2
    assert all(name.endswith("lora_B") for name in factors(ours.shards, trained_only=True))


def test_a_tier_that_is_not_asked_for_and_a_shard_without_layers_stay_as_they_are(
    bundle: Path, tmp_path: Path
) -> None:
    assert not factors([site(bundle, LoraSettings(tiers=("device",))).edge])
    _, headed = train_bundle("llama", tmp_path, cuts=Cuts(edge=1, cloud=4))
    assert not factors([site(headed).device])
