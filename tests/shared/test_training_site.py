"""A site's model is the whole model: its gradients, through a core elsewhere, are those in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from tests.cloud.parities import FEATURES
from tests.shared.sites import LORA, floats, local_core, site, tokens, train_bundle, unsettle
from trifold.shared.bundle.manifest import CodecName
from trifold.shared.errors import ConfigError
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.training.cache import RowCache
from trifold.shared.training.diverged import TrainingDiverged
from trifold.shared.training.lora import LoraSettings, factors
from trifold.shared.training.site import LocalCore, SiteModel
from trifold.shared.training.wire import Batch, through

Arrays = dict[str, NDArray[np.float32]]
CASES = [(family, name) for family in FEATURES for name in FEATURES[family] if name != "fp8"]
SCALE = LORA.alpha / LORA.rank
DEVICE = LoraSettings(rank=4, tiers=("device",))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bundle("deepseek_v3", tmp_path_factory.mktemp("nano"))[1]


class CountingCore:
    """A core that notes what it is asked for."""

    def __init__(self, core: LocalCore) -> None:
        self.core = core
        self.kept: list[bool] = []
        self.sequences = 0
        self.backwards = 0

    def forward(self, rows: Batch, *, keep: bool) -> tuple[int, Batch]:
        self.kept.append(keep)
        self.sequences += len(rows)
        return self.core.forward(rows, keep=keep)

    def backward(self, batch: int, gradients: Batch) -> Batch:
        self.backwards += 1
        return self.core.backward(batch, gradients)


def whole_model_gradients(model: Any, given: Arrays, ids: NDArray[np.int64]) -> tuple[float, Arrays]:
    """Loss and gradients of factors beside the projections of transformers' whole model: no peft here."""
    weights = {name: torch.from_numpy(array).requires_grad_() for name, array in given.items()}
    for name in {name.rsplit(".", 1)[0] for name in given}:
        a, b = weights[f"{name}.lora_A"], weights[f"{name}.lora_B"]
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, out, a=a, b=b: out + inputs[0] @ a.T @ b.T * SCALE
        )
    logits = model(torch.from_numpy(ids[:, :-1])).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(ids[:, 1:]).flatten())
    found = torch.autograd.grad(loss, list(weights.values()))
    return loss.item(), {name: grad.numpy() for name, grad in zip(weights, found, strict=True)}


def gradients(site: SiteModel, ids: NDArray[np.int64]) -> tuple[float, Arrays]:
    """The same of a site."""
    loss = site.loss(ids)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), {
        shard.checkpoint_name(name).removesuffix(".default.weight"): weight.grad.float().cpu().numpy()
        for shard in site.shards
        for name, weight in shard.named_parameters()
        if weight.grad is not None
    }


def error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("family", "name"), CASES)
def test_gradients_through_the_core_are_those_of_the_whole_model(
    family: str, name: str, tmp_path: Path
) -> None:
    model, bundle = train_bundle(family, tmp_path, **FEATURES[family][name])
    ours, ids = site(bundle), tokens(2, 24)
    unsettle(ours)
    loss, found = gradients(ours, ids)
    expected_loss, expected = whole_model_gradients(model, factors(ours.shards), ids)
    assert abs(loss - expected_loss) < 1e-5 * expected_loss
    assert found.keys() == expected.keys()
    worst = max(error(found[name], expected[name]) for name in found)
    print(f"{family} {name}: worst relative error of {len(found)} gradients {worst:.1e}")
    assert worst < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_shards_on_a_gpu_have_the_gradients_of_those_on_the_cpu(bundle: Path) -> None:
    ours, theirs, ids = site(bundle), site(bundle), tokens(2, 24)
    for each in (ours, theirs):
        unsettle(each)
    for shard in theirs.shards:
        shard.to("cuda")
    _, expected = gradients(ours, ids)
    _, found = gradients(theirs, ids)
    assert {weight.grad.device.type for weight in theirs.parameters() if weight.grad is not None} == {"cuda"}
    assert max(error(found[name], expected[name]) for name in expected) < 1e-3


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_both_cuts_pass_rows_and_gradients_through_their_codecs(bundle: Path, codec: CodecName) -> None:
    ids = tokens(2, 12)
    ours = site(bundle, core=local_core(bundle, rows=codec, gradients="bf16"))
    plain, hidden = local_core(bundle), floats(bundle, "cloud").spec.hidden
    rows, back = RowCodec(codec, hidden), RowCodec("bf16", hidden)
    with torch.no_grad():
        sent = through(ours.edge(torch.from_numpy(ids[:, :-1])).numpy(), rows)
    batch, behind = plain.forward(sent, keep=True)
    number, arrived = ours.core.forward(sent, keep=True)
    assert np.array_equal(arrived, through(behind, rows))
    given = np.random.default_rng(0).normal(size=behind.shape).astype(np.float32)
    expected = through(plain.backward(batch, through(given, back)), back)
    assert np.array_equal(ours.core.backward(number, given), expected)


def test_gradients_in_int8_point_where_those_in_fp32_do(bundle: Path) -> None:
    ids, exact, coarse = tokens(4, 32), site(bundle), site(bundle, core=local_core(bundle, gradients="int8"))
    for each in (exact, coarse):
        unsettle(each)
    _, expected = gradients(exact, ids)
    _, found = gradients(coarse, ids)
    assert max(error(found[name], expected[name]) for name in expected) < 0.05


def test_the_core_keeps_batches_for_gradients_alone(bundle: Path) -> None:
    core = CountingCore(local_core(bundle))
    ours = site(bundle, core=core)
    with torch.no_grad():
        ours.loss(tokens(2, 8))
    gradients(ours, tokens(2, 8))
    assert core.kept == [False, True]
    assert core.backwards == 1


def test_with_lora_on_the_device_alone_nothing_goes_back_to_the_core(bundle: Path) -> None:
    core = CountingCore(local_core(bundle))
    _, found = gradients(site(bundle, DEVICE, core=core), tokens(2, 8))
    assert found
    assert core.kept == [False]
    assert core.backwards == 0


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_kept_rows_spare_the_core_and_change_no_loss_and_no_gradient(
    bundle: Path, tmp_path: Path, codec: CodecName
) -> None:
    core = CountingCore(local_core(bundle, rows=codec))
    cache = RowCache(tmp_path / "rows", RowCodec(codec, 64), "digest")
    batches = [tokens(4, 9), tokens(4, 9)[[2, 0, 3, 1]], tokens(6, 9)]
    found = [gradients(site(bundle, DEVICE, core=core, cache=cache), batch) for batch in batches]
    assert core.sequences == 6
    again = [gradients(site(bundle, DEVICE, core=core, cache=cache), batch) for batch in batches]
    assert core.sequences == 6
    for (loss, first), (same_loss, second) in zip(found, again, strict=True):
        assert loss == same_loss
        assert all(np.array_equal(first[name], second[name]) for name in first)
    plain, expected = gradients(site(bundle, DEVICE, core=core), batches[0])
    assert abs(plain - found[0][0]) < 1e-5
    assert max(error(found[0][1][name], expected[name]) for name in expected if expected[name].any()) < 1e-4


def test_rows_cut_short_or_of_another_bundle_are_computed_again(bundle: Path, tmp_path: Path) -> None:
    core = CountingCore(local_core(bundle))
    codec = RowCodec("int8", 64)
    cache = RowCache(tmp_path, codec, "digest")
    expected, _ = gradients(site(bundle, DEVICE, core=core, cache=cache), tokens(3, 9))
    next(tmp_path.glob("digest/*.rows")).write_bytes(b"")
    found, _ = gradients(site(bundle, DEVICE, core=core, cache=cache), tokens(3, 9))
    assert found == pytest.approx(expected, abs=1e-6)
    assert core.sequences == 4
    gradients(site(bundle, DEVICE, core=core, cache=RowCache(tmp_path, codec, "another")), tokens(3, 9))
    assert core.sequences == 7


def test_rows_of_a_former_bundle_do_not_stay_on_the_disk(tmp_path: Path) -> None:
    codec, rows = RowCodec("int8", 64), np.ones((9, 64), np.float32)
    (tmp_path / "from-an-older-version.rows").write_bytes(b"rows")
    former = RowCache(tmp_path, codec, "former")
    former.put(tokens(1, 9)[0, :9], rows)
    kept = RowCache(tmp_path, codec, "present")
    kept.put(tokens(1, 9)[0, :9], rows)
    assert RowCache(tmp_path, codec, "present").get(tokens(1, 9)[0, :9]) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["present"]


def test_rows_kept_by_a_training_in_bfloat16_are_those_of_one_in_fp32(bundle: Path, tmp_path: Path) -> None:
    codec = RowCodec("none", 64)
    losses = []
    for folder, precision in (("first", "fp32"), ("second", "bf16")):
        cache = RowCache(tmp_path / folder, codec, "digest")
        ours = site(bundle, DEVICE, cache=cache)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            ours.loss(tokens(3, 9))
        losses.append(ours.loss(tokens(3, 9)).item())
    assert losses[0] == losses[1]


def test_kept_rows_beside_lora_on_the_edge_are_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device alone"):
        site(bundle, cache=RowCache(tmp_path, RowCodec("int8", 64), "digest"))


def test_rows_that_are_not_finite_never_reach_the_core(bundle: Path) -> None:
    core = CountingCore(local_core(bundle))
    ours = site(bundle, core=core)
    with torch.no_grad():
        ours.edge.model.embed_tokens.weight[:] = np.inf
    with pytest.raises(TrainingDiverged, match="the edge's rows hold values that are not finite"):
        ours.loss(tokens(1, 8))
    assert not core.kept
