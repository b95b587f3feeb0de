"""Adapter versions: built from LoRA factors, kept beside the bundle, promoted and taken back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from tests.adapters import ALPHA, RANK, random_factors
from tests.checkpoints import header, save_random, write_tokenizer
from trifold.cloud.adapter.build import add_version
from trifold.cloud.adapter.command import adapter as commands
from trifold.cloud.split.split import split
from trifold.cloud.verify.command import compare
from trifold.cloud.verify.float_model import FloatModel
from trifold.shared.bundle.adapter import Origin
from trifold.shared.bundle.factors import LoraFactors
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import Cuts
from trifold.shared.bundle.store import AdapterStore, find, promote, rollback, stores
from trifold.shared.errors import ConfigError, DamagedFile, DigestMismatch, InvalidRequest, TrifoldError
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.model.shapes import tensor_shapes
from trifold.shared.runtime.monolith import Monolith
from trifold.shared.runtime.shard import Shard

CUTS = Cuts(edge=1, cloud=3)
ORIGIN = Origin(producer="tests", round=3)
EDGE, DEVICE = "edge", "device"


@pytest.fixture(scope="module")
def made(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapters") / "bundle"
    split(Checkpoint.open(checkpoint), CUTS, out, train=True)
    return out


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A bundle to add versions to."""
    return shutil.copytree(made, tmp_path / "bundle")


@pytest.fixture
def factors(checkpoint: Path, made: Path) -> LoraFactors:
    return random_factors(checkpoint, made)


def merged(checkpoint: Checkpoint, factors: LoraFactors, out: Path) -> Checkpoint:
    """A checkpoint whose float weights have the factors in them."""
    shapes = tensor_shapes(checkpoint.names)
    out.mkdir()
    (out / "config.json").write_text(json.dumps(checkpoint.config))
    with (out / "model.safetensors").open("wb") as file:
        file.write(header({name: ("F32", shape) for name, shape in shapes.items()}))
        for name in shapes:
            file.write(factors.merged(name, checkpoint.read(name)).tobytes())
    write_tokenizer(out, checkpoint.spec.vocab)
    return Checkpoint.open(out)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "qwen3_moe", "llama"])
@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_a_version_is_what_a_split_of_the_fine_tuned_model_would_be(
    family: str, quantization: str, tmp_path: Path
) -> None:
    quant = {"quantization": quantization}
    path = save_random(family, tmp_path / "model")
    split(Checkpoint.open(path), CUTS, tmp_path / "bundle", train=True, **quant)  # type: ignore[arg-type]
    factors = random_factors(path, tmp_path / "bundle")
    digest = add_version(tmp_path / "bundle", factors, ORIGIN)
    tuned = merged(Checkpoint.open(path), factors, tmp_path / "tuned")
    split(tuned, CUTS, tmp_path / "wanted", **quant)  # type: ignore[arg-type]
    for store in stores(tmp_path / "bundle"):
        wanted = TierFolder.open(tmp_path / "wanted", store.folder.tier)
        version = store.version(digest)
        assert set(version.adapter.files) == {"weights.bin"}
        for name in ("model.onnx", "weights.bin"):
            assert version.read(name) == wanted.read(name)
    cloud = [TierFolder.open(tmp_path / out, "cloud").read("weights.bin") for out in ("bundle", "wanted")]
    assert cloud[0] == cloud[1]


def test_a_version_predicts_what_the_float_model_with_the_factors_in_it_predicts(tmp_path: Path) -> None:
    path = save_random("deepseek_v3", tmp_path / "model")
    split(Checkpoint.open(path), CUTS, tmp_path / "bundle", quantization="none", codec="none", train=True)
    factors = random_factors(path, tmp_path / "bundle")
    digest = add_version(tmp_path / "bundle", factors, ORIGIN)
    model = FloatModel.load(path)
    model.merge(factors)
    text = np.random.default_rng(0).integers(0, 384, 100)
    adapted = compare(model, Monolith.load(tmp_path / "bundle", adapter=digest, threads=1), [text])
    plain = compare(model, Monolith.load(tmp_path / "bundle", threads=1), [text])
    assert adapted.split.kl < 1e-8
    assert plain.split.kl > 0.01


def test_factors_of_zero_change_no_file_and_those_of_one_tier_none_of_the_other(
    checkpoint: Path, bundle: Path, factors: LoraFactors
) -> None:
    zeros = {name: values * np.float32(name.endswith("A")) for name, values in factors.tensors.items()}
    nothing = add_version(bundle, LoraFactors(zeros, ALPHA, RANK), ORIGIN)
    edge_only = add_version(bundle, random_factors(checkpoint, bundle, tiers=["edge"]), ORIGIN)
    edge, device = stores(bundle)
    assert [len(store.version(nothing).adapter.files) for store in (edge, device)] == [0, 0]
    assert [len(store.version(edge_only).adapter.files) for store in (edge, device)] == [1, 0]
    base = TierFolder.open(bundle, "device")
    assert device.version(edge_only).read("weights.bin") == base.read("weights.bin")
    assert device.version(edge_only).read("tokenizer.json") == base.read("tokenizer.json")


def test_whoever_has_one_tier_only_builds_the_same_part_under_the_same_digest(
    bundle: Path, factors: LoraFactors, tmp_path: Path
) -> None:
    whole = add_version(bundle, factors, ORIGIN)
    for tier in (EDGE, DEVICE):
        shutil.copytree(bundle / tier, tmp_path / tier, ignore=shutil.ignore_patterns("adapters"))
        assert add_version(tmp_path / tier, factors, Origin(producer="a site")) == whole
        [here] = stores(tmp_path / tier)
        [there] = [store for store in stores(bundle) if store.folder.tier == tier]
        assert here.version(whole).adapter.files == there.version(whole).adapter.files


def test_a_digest_tells_versions_apart_and_not_where_they_come_from(
    checkpoint: Path, bundle: Path, factors: LoraFactors
) -> None:
    digest = add_version(bundle, factors, ORIGIN)
    assert add_version(bundle, factors, Origin(producer="someone else")) == digest
    assert stores(bundle)[0].version(digest).adapter.origin.producer == "tests"
    others = [
        LoraFactors(factors.tensors, ALPHA / 2, RANK),
        random_factors(checkpoint, bundle, seed=1),
        random_factors(checkpoint, bundle, tiers=["edge"]),
    ]
    assert len({digest, *(add_version(bundle, other, ORIGIN) for other in others)}) == 4
    assert (
        TierFolder.open(bundle, "edge").manifest.serving.digest()
        == Monolith.load(bundle, threads=1).manifest.serving_digest
    )


def renamed(factors: LoraFactors, old: str, new: str) -> LoraFactors:
    tensors = {name.replace(old, new): values for name, values in factors.tensors.items()}
    return LoraFactors(tensors, ALPHA, RANK)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda factors: renamed(factors, "layers.0.", "layers.1."), "layers.1.* is in the core"),
        (lambda factors: renamed(factors, "layers.0.", "layers.9."), "layers.9.*this model does not have"),
        (lambda factors: renamed(factors, "q_a_proj", "k_proj"), "k_proj, which this model does not have"),
        (lambda factors: renamed(factors, "0.mlp.down", "0.mlp.up"), r"up_proj .* it is \[96, 64\]"),
    ],
)
def test_factors_that_have_no_place_are_refused_by_name_and_leave_nothing(
    bundle: Path, factors: LoraFactors, change: Callable[[LoraFactors], LoraFactors], hint: str
) -> None:
    with pytest.raises(InvalidRequest, match=hint):
        add_version(bundle, change(factors), ORIGIN)
    assert not (bundle / "edge" / "adapters").exists()


def test_a_bundle_without_float_weights_or_with_altered_ones_is_refused(
    attending_bundle: Path, bundle: Path, factors: LoraFactors
) -> None:
    with pytest.raises(ConfigError, match="--train"):
        add_version(attending_bundle, factors, ORIGIN)
    with pytest.raises(ConfigError, match="this is the cloud's part"):
        add_version(bundle / "cloud", factors, ORIGIN)
    flip(bundle / "device" / "float.safetensors", -1)
    with pytest.raises(DamagedFile, match=r"device/float\.safetensors"):
        add_version(bundle, factors, ORIGIN)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("tier", [EDGE, DEVICE])
def test_a_damaged_version_is_refused_by_file_name_and_not_promoted(
    bundle: Path, factors: LoraFactors, tier: str
) -> None:
    digest = add_version(bundle, factors, ORIGIN)
    [store] = stores(bundle / tier)
    version = bundle / tier / "adapters" / digest
    flip(version / "weights.bin", 1000)
    with pytest.raises(DamagedFile, match=rf"{digest}/weights\.bin"):
        Shard.load(store.open(digest))
    with pytest.raises(DamagedFile, match=rf"{digest}/weights\.bin"):
        promote(bundle, digest)
    assert [other.current() for other in stores(bundle)] == ["", ""]
    good = (version / "adapter.json").read_bytes()
    for at in range(good.index(b'"digest"') + 12, good.index(b'"files"') - 4, 11):
        flip(version / "adapter.json", at)
        with pytest.raises((DamagedFile, DigestMismatch), match=rf"{digest}"):
            store.open(digest)
        (version / "adapter.json").write_bytes(good)
    (version / "weights.bin").unlink()
    with pytest.raises(DamagedFile, match=rf"{digest}/weights\.bin"):
        store.open(digest)


def altered(path: Path) -> None:
    flip(path / "weights.bin", 1000)


def truncated(path: Path) -> None:
    os.truncate(path / "weights.bin", 100)


def without_weights(path: Path) -> None:
    (path / "weights.bin").unlink()


def without_description(path: Path) -> None:
    (path / "adapter.json").unlink()


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


def a_broken_link(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    "damage", [altered, truncated, without_weights, without_description, empty, a_file, a_broken_link]
)
def test_a_damaged_version_is_mended_by_adding_it_again_and_a_sound_one_left_alone(
    bundle: Path, factors: LoraFactors, damage: Callable[[Path], None]
) -> None:
    digest = add_version(bundle, factors, ORIGIN)
    edge, device = stores(bundle)
    good = edge.version(digest).read("weights.bin")
    damage(edge.path / digest)
    with pytest.raises((DamagedFile, DigestMismatch)) as refusal:
        promote(bundle, digest)
    assert "add" in refusal.value.message
    assert "split again" not in refusal.value.message
    assert add_version(bundle, factors, Origin(producer="the mender")) == digest
    assert edge.version(digest).read("weights.bin") == good
    producers = [store.version(digest).adapter.origin.producer for store in (edge, device)]
    assert producers == ["the mender", "tests"]
    promote(bundle, digest)


def test_a_damaged_version_does_not_keep_others_from_being_listed_and_promoted(
    checkpoint: Path, bundle: Path, factors: LoraFactors, tmp_path: Path
) -> None:
    good = add_version(bundle, factors, ORIGIN)
    bad = add_version(bundle, random_factors(checkpoint, bundle, seed=1), ORIGIN)
    truncated(bundle / "edge" / "adapters" / bad)
    listed = {entry["digest"]: entry for entry in json.loads(run("list", bundle, "--json"))}
    assert {*listed} == {"", good, bad}
    assert not listed[good]["problems"]
    assert f"{bad}/weights.bin: has 100 bytes" in listed[bad]["problems"]["edge"]
    assert listed[bad]["tiers"] == ["edge", "device"]
    assert (listed[bad]["producer"], listed[bad]["round"]) == ("tests", 3)
    assert "(unusable)" in run("list", bundle)
    assert good[:12] in run("promote", bundle, good[:8])
    with pytest.raises(DamagedFile, match=rf"{bad}/weights\.bin"):
        run("promote", bundle, bad[:8])
    without_description(bundle / "device" / "adapters" / bad)
    [unknown] = [entry for entry in json.loads(run("list", bundle, "--json")) if entry["digest"] == bad]
    assert list(unknown["problems"]) == ["edge", "device"]


def test_what_a_killed_builder_left_is_swept_away_by_the_next(bundle: Path, factors: LoraFactors) -> None:
    left = bundle / "edge" / "adapters" / ".building.abc" / "version"
    left.mkdir(parents=True)
    (left / "weights.bin").write_bytes(b"half")
    digest = add_version(bundle, factors, ORIGIN)
    names = {path.name for path in (bundle / "edge" / "adapters").iterdir()}
    assert names == {digest, ".building"}


def test_builders_at_the_same_time_wait_for_each_other(bundle: Path, factors: LoraFactors) -> None:
    with ThreadPoolExecutor(4) as executor:
        digests = {*executor.map(lambda _: add_version(bundle, factors, ORIGIN), range(4))}
    [digest] = digests
    for store in stores(bundle):
        store.verify(digest)


def test_a_version_is_on_the_disk_before_it_has_its_name_and_so_is_the_name_when_it_is_added(
    bundle: Path, factors: LoraFactors, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, synced = os.fsync, list[tuple[str, bool]]()

    def note(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        store = bundle.resolve() / "edge" / "adapters"
        if path.is_relative_to(store):
            synced.append((path.name, any(len(child.name) == 64 for child in store.iterdir())))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    add_version(bundle, factors, ORIGIN)
    assert {*synced[:-1]} == {("adapter.json", False), ("weights.bin", False), ("version", False)}
    assert synced[-1] == ("adapters", True)


@pytest.mark.parametrize("digest", ["ab" * 32, "..", "../edge", "current", "AB" * 32, "a"])
def test_a_version_that_is_not_there_is_refused(bundle: Path, digest: str) -> None:
    for act in (lambda: promote(bundle, digest), lambda: AdapterStore.open(stores(bundle)[0], digest)):
        with pytest.raises(DigestMismatch, match="has no adapter version"):
            act()


def test_a_version_of_another_bundle_is_refused(
    checkpoint: Path, bundle: Path, factors: LoraFactors, tmp_path: Path
) -> None:
    digest = add_version(bundle, factors, ORIGIN)
    split(Checkpoint.open(checkpoint), CUTS, tmp_path / "other", quantization="int4", train=True)
    for tier in (EDGE, DEVICE):
        shutil.copytree(bundle / tier / "adapters", tmp_path / "other" / tier / "adapters")
    with pytest.raises(DigestMismatch, match="was made for bundle"):
        promote(tmp_path / "other", digest)


def test_promotions_are_taken_back_one_after_the_other(
    checkpoint: Path, bundle: Path, factors: LoraFactors
) -> None:
    first = add_version(bundle, factors, ORIGIN)
    second = add_version(bundle, random_factors(checkpoint, bundle, seed=1), ORIGIN)
    for digest in (first, second, second, "", first):
        promote(bundle, digest)
        assert [store.current() for store in stores(bundle)] == [digest, digest]
    assert [rollback(bundle) for _ in range(4)] == ["", second, first, ""]
    with pytest.raises(ConfigError, match="no version has been promoted"):
        rollback(bundle)
    promote(bundle / "edge", first)
    promote(bundle / "device", second)
    promote(bundle, "")
    with pytest.raises(
        ConfigError, match=f"edge had {first[:12]}, the device had {second[:12]}: promote one"
    ):
        rollback(bundle)


def test_a_promotion_that_reached_one_tier_is_told_and_can_be_made_again(
    bundle: Path, factors: LoraFactors
) -> None:
    digest = add_version(bundle, factors, ORIGIN)
    draft = bundle / "device" / "adapters" / f".current.{os.getpid()}"
    draft.mkdir()  # a file of this name cannot be written
    with pytest.raises(ConfigError, match="device/adapters/current: cannot be written"):
        promote(bundle, digest)
    with pytest.raises(ConfigError, match=f"the edge has {digest[:12]}, the device has base: promote one"):
        rollback(bundle)
    draft.rmdir()
    promote(bundle, digest)
    assert [store.history() for store in stores(bundle)] == [[digest], [digest]]
    assert rollback(bundle) == ""


def test_what_was_taken_back_was_promoted_and_what_was_added_was_not(
    checkpoint: Path, bundle: Path, factors: LoraFactors
) -> None:
    first = add_version(bundle, factors, ORIGIN)
    second = add_version(bundle, random_factors(checkpoint, bundle, seed=1), ORIGIN)
    promote(bundle, first)
    rollback(bundle)
    for store in stores(bundle):
        assert (store.history(), store.promoted()) == ([], {first})
    promote(bundle, second)
    promote(bundle, first)
    rollback(bundle)
    for store in stores(bundle):
        assert (store.history(), store.promoted()) == ([second], {first, second})


def test_promotions_at_the_same_time_are_all_made_and_the_tiers_agree(checkpoint: Path, bundle: Path) -> None:
    digests = [
        add_version(bundle, random_factors(checkpoint, bundle, seed=seed, tiers=["edge"]), ORIGIN)
        for seed in range(6)
    ]
    with ThreadPoolExecutor(len(digests)) as executor:
        list(executor.map(partial(promote, bundle), digests))
    edge, device = stores(bundle)
    assert sorted(edge.history()) == sorted(digests)
    assert edge.history() == device.history()


@pytest.mark.parametrize("content", [b"nonsense\n", b"\xff\xff", b"ab\n", b"../../etc\n", b"--base\n"])
def test_a_damaged_promotion_is_refused_by_file_name(bundle: Path, content: bytes) -> None:
    promote(bundle, "")
    (bundle / "edge" / "adapters" / "current").write_bytes(content)
    with pytest.raises(DamagedFile, match="edge/adapters/current"):
        stores(bundle)[0].current()


def test_a_promotion_changes_nothing_where_one_of_the_tiers_is_damaged(
    bundle: Path, factors: LoraFactors
) -> None:
    digest = add_version(bundle, factors, ORIGIN)
    damaged = bundle / "device" / "adapters" / "current"
    damaged.write_text("nonsense")
    with pytest.raises(DamagedFile, match="device/adapters/current"):
        promote(bundle, digest)
    assert stores(bundle)[0].current() == ""
    damaged.unlink()
    promote(bundle, digest)


def run(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(commands, [str(argument) for argument in arguments])
    if code == 0 and result.exception:
        raise result.exception
    return result.stdout


def test_the_commands_build_show_promote_and_take_back(
    bundle: Path, factors: LoraFactors, tmp_path: Path
) -> None:
    told = {"alpha": str(ALPHA), "rank": str(RANK), "run": "pilot", "round": "7"}
    save_file(dict(factors.tensors), tmp_path / "adapter.safetensors", metadata=told)
    digest = run("add", bundle, tmp_path / "adapter.safetensors").strip()
    listed = json.loads(run("list", bundle, "--json"))
    assert [entry["digest"] for entry in listed] == ["", digest]
    assert listed[1]["tiers"] == listed[0]["in_force"] == ["edge", "device"]
    assert (listed[1]["run"], listed[1]["round"], listed[1]["parent"]) == ("pilot", 7, "")
    assert listed[1]["bytes"] == sum(
        (bundle / tier / "adapters" / digest / "weights.bin").stat().st_size for tier in (EDGE, DEVICE)
    )
    assert digest[:12] in run("promote", bundle, digest[:8])
    assert digest[:12] in run("list", bundle)
    assert json.loads(run("list", bundle, "--json"))[1]["in_force"] == ["edge", "device"]
    assert "base" in run("rollback", bundle)
    assert [store.current() for store in stores(bundle)] == ["", ""]


@pytest.mark.parametrize("prefix", ["", "zz", "0x"])
def test_the_beginning_of_a_digest_must_mean_one_version(
    bundle: Path, factors: LoraFactors, prefix: str
) -> None:
    add_version(bundle, factors, ORIGIN)
    with pytest.raises(InvalidRequest, match="trifold adapter list"):
        find(bundle, prefix)
    with pytest.raises(TrifoldError):
        run("promote", bundle, "zz")
