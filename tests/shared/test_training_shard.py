"""Torch shards: transformers' own model, cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.checkpoints import SMALL
from tests.cloud.parities import FEATURES
from tests.shared.sites import floats, shard, site, tokens, train_bundle, unsettle
from trifold.cloud.split.split import split
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import FLOATS, Cuts
from trifold.shared.errors import ConfigError, DamagedFile, UnsupportedModel
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.training.shard import TorchShard
from trifold.shared.training.slices import FloatSlice

CASES = [(family, name) for family in FEATURES for name in FEATURES[family] if name != "fp8"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bundle("deepseek_v3", tmp_path_factory.mktemp("nano"))[1]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_joined_shards_give_the_logits_of_transformers(family: str, name: str, tmp_path: Path) -> None:
    model, bundle = train_bundle(family, tmp_path, **FEATURES[family][name])
    ids = torch.from_numpy(tokens(2, 40))
    with torch.no_grad():
        rows = shard(bundle, "cloud")(shard(bundle, "edge")(ids))
        found, expected = shard(bundle, "device")(rows), model(ids).logits
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("cuts", [Cuts(edge=0, cloud=4), Cuts(edge=0, cloud=1), Cuts(edge=3, cloud=4)])
def test_a_tier_may_have_no_layers_at_all(cuts: Cuts, tmp_path: Path) -> None:
    model, bundle = train_bundle("qwen3_moe", tmp_path, cuts=cuts)
    ids = torch.from_numpy(tokens(1, 12))
    with torch.no_grad():
        found = shard(bundle, "device")(shard(bundle, "cloud")(shard(bundle, "edge")(ids)))
        expected = model(ids).logits
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_every_weight_of_a_shard_is_frozen(bundle: Path) -> None:
    assert not [name for name, weight in shard(bundle, "edge").named_parameters() if weight.requires_grad]


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral"])
def test_a_checkpointed_core_keeps_less_and_gives_the_same_gradients(family: str, tmp_path: Path) -> None:
    # The config asks for noise in training, which would make the second computation another one.
    noise: dict[str, Any] = {"attention_dropout": 0.5}
    if family == "mixtral":
        noise["router_jitter_noise"] = 0.5
    _, bundle = train_bundle(family, tmp_path, cuts=Cuts(edge=0, cloud=4), **noise)
    rows = torch.randn(2, 24, SMALL[family]["hidden_size"])
    core = shard(bundle, "cloud")
    gradients, kept = [], []
    for checkpointing in (False, True):
        inputs, sizes = rows.clone().requires_grad_(), list[int]()
        core.checkpointing = checkpointing

        def keep(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = core(inputs)
        kept.append(sum(sizes))
        gradients.append(torch.autograd.grad(outputs.square().sum(), inputs)[0])
    assert torch.equal(*gradients)
    assert kept[1] < kept[0] / 4


def test_a_checkpointed_site_gives_the_same_gradients(bundle: Path) -> None:
    plain, thrifty = site(bundle), site(bundle)
    for each in (plain, thrifty):
        unsettle(each)
        for part in each.shards:
            part.checkpointing = each is thrifty
        each.loss(tokens(2, 16)).backward()  # type: ignore[no-untyped-call]
    for ours, theirs in zip(plain.parameters(), thrifty.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


def test_a_shard_in_bfloat16_computes_nearly_the_same(bundle: Path) -> None:
    rows = torch.randn(1, 12, 64)
    with torch.no_grad():
        exact = shard(bundle, "cloud")(rows)
        near = shard(bundle, "cloud", dtype=torch.bfloat16)(rows)
    assert near.dtype == torch.bfloat16
    assert (near.float() - exact).norm() < 0.05 * exact.norm()


def test_a_bundle_split_without_train_says_how_to_split_again(checkpoint: Path, tmp_path: Path) -> None:
    split(Checkpoint.open(checkpoint), Cuts(edge=1, cloud=3), tmp_path / "bundle")
    with pytest.raises(ConfigError, match="trifold split --train"):
        floats(tmp_path / "bundle", "edge")


def test_altered_weights_are_refused_by_the_name_of_the_file(bundle: Path, tmp_path: Path) -> None:
    for file in (bundle / "edge").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = bytearray((tmp_path / FLOATS).read_bytes())
    data[-1] ^= 1
    (tmp_path / FLOATS).write_bytes(data)
    with pytest.raises(DamagedFile, match=FLOATS):
        shard(tmp_path, "edge")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"attention_bias": True}, "wants .*bias"), ({"first_k_dense_replace": 9}, "wants .*mlp")],
)
def test_a_model_that_transformers_builds_otherwise_is_refused_by_a_tensor(
    bundle: Path, change: dict[str, Any], complaint: str
) -> None:
    folder = TierFolder.open(bundle, "edge")
    config = {**FloatSlice.open(folder).config, **change}
    with pytest.raises(UnsupportedModel, match=complaint):
        TorchShard.load(FloatSlice(folder, config))
