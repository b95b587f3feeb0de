"""Splitting a checkpoint into a bundle."""

from __future__ import annotations

import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import SMALL, generate, save_fp8, save_random
from trifold.cloud.split.split import split
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import TIERS, Cuts, Manifest
from trifold.shared.errors import ConfigError, DamagedFile, InvalidRequest
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.model.safetensors import SafetensorsFile
from trifold.shared.model.shapes import tensor_shapes

CUTS = Cuts(edge=1, cloud=3)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_checkpoint_gives_the_same_bytes_and_digest(checkpoint: Path, tmp_path: Path) -> None:
    manifests = [split(Checkpoint.open(checkpoint), CUTS, tmp_path / name) for name in ("one", "two")]
    assert manifests[0] == manifests[1]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_whatever_decides_on_tokens_changes_the_digest(checkpoint: Path, tmp_path: Path) -> None:
    model = Checkpoint.open(checkpoint)
    digests = {
        split(model, CUTS, tmp_path / "bundle").serving_digest,
        split(model, Cuts(edge=1, cloud=4), tmp_path / "bundle").serving_digest,
        split(model, CUTS, tmp_path / "bundle", quantization="int4").serving_digest,
        split(model, CUTS, tmp_path / "bundle", codec="bf16").serving_digest,
    }
    assert len(digests) == 4


def test_float_weights_lie_outside_the_digest(checkpoint: Path, tmp_path: Path) -> None:
    model = Checkpoint.open(checkpoint)
    without = split(model, CUTS, tmp_path / "without")
    trained = split(model, CUTS, tmp_path / "with", train=True)
    assert without.serving_digest == trained.serving_digest
    assert without.training == {}
    assert set(trained.training["edge"]) == {"float.safetensors", "config.json"}


def test_a_tier_holds_its_own_files_and_the_device_the_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    manifest = split(Checkpoint.open(checkpoint), CUTS, tmp_path / "bundle")
    shard = {"model.onnx", "weights.bin"}
    text = {"tokenizer.json", "tokenizer_config.json"}
    assert {tier: set(files) for tier, files in manifest.serving.files.items()} == {
        "cloud": shard,
        "edge": shard,
        "device": shard | text,
    }
    for tier in TIERS:
        folder = TierFolder.open(tmp_path / "bundle", tier)
        assert folder.manifest == manifest
        for name in folder.files:
            folder.read(name)


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral", "llama"])
def test_float_slices_hold_every_tensor_of_the_checkpoint_once(family: str, tmp_path: Path) -> None:
    model = Checkpoint.open(save_random(family, tmp_path / "model", tie_word_embeddings=family == "llama"))
    manifest = split(model, CUTS, tmp_path / "bundle", train=True)
    seen: dict[str, str] = {}
    for tier in TIERS:
        file = SafetensorsFile(tmp_path / "bundle" / tier / "float.safetensors")
        for name, entry in file.entries.items():
            assert np.array_equal(file.rows(name, 0, entry.shape[0]), model.read(name))
            assert name not in seen or name == model.names.embedding
            seen[name] = tier
        folder = TierFolder.open(tmp_path / "bundle", tier)
        for name in manifest.training[tier]:
            assert folder.read(name)
    assert seen.keys() == tensor_shapes(model.names).keys()


def test_fp8_weights_become_bf16_slices(tmp_path: Path) -> None:
    model = Checkpoint.open(save_fp8(save_random("deepseek_v3", tmp_path / "model"), tmp_path / "fp8"))
    split(model, CUTS, tmp_path / "bundle", train=True)
    file = SafetensorsFile(tmp_path / "bundle" / "cloud" / "float.safetensors")
    name = model.names.layer(1).post_norm.replace("post_attention_layernorm", "self_attn.o_proj")
    assert file.entries[name].dtype == "BF16"
    found = file.rows(name, 0, 64).astype(np.float32)
    assert np.allclose(found, model.read(name), rtol=2**-8)


def test_an_older_bundle_is_replaced_and_anything_else_is_not(checkpoint: Path, tmp_path: Path) -> None:
    model = Checkpoint.open(checkpoint)
    split(model, CUTS, tmp_path / "bundle")
    newer = split(model, CUTS, tmp_path / "bundle", quantization="none")
    assert TierFolder.open(tmp_path / "bundle", "edge").manifest == newer
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    with pytest.raises(ConfigError, match="exists and is not a bundle"):
        split(model, CUTS, tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "cat"


def test_a_split_that_is_interrupted_leaves_the_older_bundle_and_nothing_else(
    checkpoint: Path, tmp_path: Path
) -> None:
    model = Checkpoint.open(checkpoint)
    split(model, CUTS, tmp_path / "bundle")
    before = contents(tmp_path)

    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split(model, CUTS, tmp_path / "bundle", quantization="int4", progress=interrupt)
    assert contents(tmp_path) == before


def test_progress_counts_the_bytes_of_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    split(
        Checkpoint.open(checkpoint),
        CUTS,
        tmp_path / "bundle",
        train=True,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps[-1][0] == steps[-1][1]
    assert steps == sorted(steps)
    stored = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert steps[-1][1] == pytest.approx(2 * stored, rel=0.1)


@pytest.mark.parametrize("cuts", [Cuts(edge=2, cloud=2), Cuts(edge=3, cloud=2), Cuts(edge=0, cloud=5)])
def test_cuts_that_leave_the_core_nothing_are_refused(checkpoint: Path, tmp_path: Path, cuts: Cuts) -> None:
    with pytest.raises(InvalidRequest, match=f"cuts before layers {cuts.edge} and {cuts.cloud} of 4"):
        split(Checkpoint.open(checkpoint), cuts, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    folder = save_random("llama", tmp_path / "model")
    data = bytearray((folder / "model.safetensors").read_bytes())
    entry = SafetensorsFile(folder / "model.safetensors").entries["model.layers.2.mlp.up_proj.weight"]
    data[entry.start : entry.start + 4] = np.float32(np.nan).tobytes()
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(DamagedFile, match=r"model\.layers\.2\.mlp\.up_proj\.weight holds values"):
        split(Checkpoint.open(folder), CUTS, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_memory_stays_far_below_the_largest_tensor(tmp_path: Path) -> None:
    config = {**SMALL["llama"], "model_type": "llama", "vocab_size": 2**19, "rms_norm_eps": 1e-6}
    model = Checkpoint.open(generate(config, tmp_path / "model"))
    largest = 4 * 2**19 * 64
    tracemalloc.start()
    split(model, CUTS, tmp_path / "bundle", train=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < largest / 2


def trifold_split(*arguments: str, largest: int = resource.RLIM_INFINITY) -> subprocess.CompletedProcess[str]:
    """`trifold split`, which cannot write a file of more than `largest` bytes."""
    limited = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({largest}, {largest}))\n"
        "from trifold.shared.cli.main import main; main()"
    )
    command = [sys.executable, "-c", limited, "split", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_disk_that_takes_no_more_is_an_error_with_a_name_and_leaves_the_older_bundle_and_nothing_else(
    checkpoint: Path, tmp_path: Path
) -> None:
    split(Checkpoint.open(checkpoint), CUTS, tmp_path / "bundle")
    before = contents(tmp_path)
    for options in ((), ("--train",)):
        arguments = (str(checkpoint), "--out", str(tmp_path / "bundle"), "--quant", "int4", *options)
        full = trifold_split(*arguments, largest=40_000)
        assert full.returncode == 78, full.stderr
        assert "bundle: cannot be written: File too large" in full.stderr
        assert contents(tmp_path) == before
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_output_that_cannot_be_made_is_refused_without_a_progress_bar(
    checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    refused = trifold_split(str(checkpoint), "--out", str(tmp_path / "file" / "bundle"))
    assert refused.returncode == 78
    assert refused.stderr.startswith("trifold: ")
    assert "file/bundle: cannot be written: " in refused.stderr


def test_the_summary_says_what_each_tier_holds_in_lines_of_a_terminal(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = trifold_split(str(checkpoint), "--out", "bundle", "--cuts", "0/3", "--train")
    lines = made.stdout.splitlines()
    assert [line.split(", ", 1)[1] for line in lines[:-1:2]] == [
        "layers 0–2",
        "embedding",
        "layer 3, norm, head",
    ]
    assert all(line.startswith("  for training: ") for line in lines[1::2])
    digest = TierFolder.open(tmp_path / "bundle", "cloud").manifest.serving_digest
    assert lines[-1].startswith(f"serving digest {digest[:12]} in ")
    assert max(map(len, lines)) <= 80


def test_the_command_prints_what_it_made_and_fails_with_a_message(checkpoint: Path, tmp_path: Path) -> None:
    def trifold(*arguments: str) -> subprocess.CompletedProcess[str]:
        return trifold_split(str(checkpoint), *arguments)

    made = trifold("--out", str(tmp_path / "bundle"), "--cuts", "1/3", "--quant", "int4", "--json")
    assert made.returncode == 0, made.stderr
    manifest = Manifest.model_validate_json(made.stdout)
    assert manifest == TierFolder.open(tmp_path / "bundle", "cloud").manifest
    assert (manifest.serving.cuts, manifest.serving.quantization) == (CUTS, "int4")
    wrong = trifold("--out", str(tmp_path / "bundle"), "--cuts", "one/two")
    assert wrong.returncode == 64
    assert "--cuts 'one/two' is not two layer numbers" in wrong.stderr
    assert "Traceback" not in wrong.stderr
