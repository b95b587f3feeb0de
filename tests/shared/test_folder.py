"""A tier's folder gives no byte that is not the one of the manifest."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest

from trifold.shared.bundle.folder import MANIFEST, TierFolder
from trifold.shared.bundle.manifest import TIERS, FileEntry, Manifest, Tier
from trifold.shared.errors import ConfigError, DamagedFile, DigestMismatch
from trifold.shared.runtime.monolith import Monolith
from trifold.shared.runtime.shard import Shard


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return shutil.copytree(bundle, tmp_path / "copy")


def flip(path: Path, offset: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset % len(data)] ^= 1 << bit
    path.write_bytes(data)


def test_a_tier_opens_by_the_root_and_by_its_own_folder(bundle: Path) -> None:
    by_root, by_itself = TierFolder.open(bundle, "edge"), TierFolder.open(bundle / "edge", "edge")
    assert by_root.path == by_itself.path == bundle / "edge"
    assert by_root.read("model.onnx") == (bundle / "edge" / "model.onnx").read_bytes()
    assert "model.onnx" in by_root
    assert "tokenizer.json" not in by_root


@pytest.mark.parametrize("tier", TIERS)
def test_a_flipped_bit_in_a_shard_is_refused_by_file_name(copy: Path, tier: Tier) -> None:
    for name in ("model.onnx", "weights.bin"):
        path = copy / tier / name
        good = path.read_bytes()
        for offset in (0, len(good) // 2, -1):
            flip(path, offset, offset % 8)
            with pytest.raises(DamagedFile, match=name):
                Shard.load(TierFolder.open(copy, tier))
            path.write_bytes(good)


def test_a_flipped_bit_in_the_tokenizer_is_refused_by_file_name(copy: Path) -> None:
    flip(copy / "device" / "tokenizer.json", 100, 0)
    with pytest.raises(DamagedFile, match=r"tokenizer\.json"):
        TierFolder.open(copy, "device").read("tokenizer.json")


def test_a_flipped_bit_in_what_the_manifest_says_of_serving_is_refused(copy: Path) -> None:
    path = copy / "cloud" / MANIFEST
    good = path.read_bytes()
    for offset in range(good.index(b'"serving_digest"'), good.index(b'"training"'), 7):
        flip(path, offset, offset % 8)
        with pytest.raises(DamagedFile, match=MANIFEST):
            TierFolder.open(copy, "cloud")
        path.write_bytes(good)


def damaged_by(change: Callable[[Path], object]) -> object:
    return pytest.param(change, id=change.__name__)


def missing(path: Path) -> None:
    path.unlink()


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def symbolic_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "change", [damaged_by(way) for way in (missing, cut_short, longer, symbolic_link, folder, pipe)]
)
def test_a_file_that_is_not_what_it_should_be_is_refused_on_opening(
    copy: Path, change: Callable[[Path], object]
) -> None:
    change(copy / "cloud" / "weights.bin")
    with pytest.raises(DamagedFile, match=r"weights\.bin"):
        TierFolder.open(copy, "cloud")


@pytest.mark.parametrize("name", ["../edge/weights.bin", "/etc/hostname", "a/b", "..", ".hidden", ""])
def test_a_manifest_cannot_name_a_file_elsewhere(copy: Path, name: str) -> None:
    path = copy / "cloud" / MANIFEST
    manifest = Manifest.model_validate_json(path.read_bytes())
    files = manifest.serving.files | {"cloud": {name: FileEntry(size=1, sha256="0" * 64)}}
    serving = manifest.serving.model_copy(update={"files": files})
    forged = manifest.model_copy(update={"serving": serving, "serving_digest": serving.digest()})
    path.write_text(forged.model_dump_json())
    with pytest.raises(DamagedFile, match="not the name of a file in the same folder"):
        TierFolder.open(copy, "cloud")


def test_the_folder_of_another_tier_is_called_by_its_name(bundle: Path) -> None:
    for tier, other in permutations(TIERS, 2):
        with pytest.raises(
            ConfigError, match=f"this is the {other}'s part; the {tier} needs the folder {tier}"
        ):
            TierFolder.open(bundle / other, tier)


def test_what_is_not_listed_is_not_read(copy: Path) -> None:
    (copy / "edge" / "stranger").write_text("hello")
    with pytest.raises(DamagedFile, match="stranger: is not listed"):
        TierFolder.open(copy, "edge").read("stranger")


def test_a_mapped_file_has_the_bytes_of_one_that_is_read_and_tells_how_far_it_is(bundle: Path) -> None:
    folder, told = TierFolder.open(bundle, "cloud"), list[tuple[int, int]]()
    with folder.mapped("weights.bin", lambda done, total: told.append((done, total))) as weights:
        assert bytes(weights) == folder.read("weights.bin")
        assert told[-1] == (len(weights), len(weights))


def test_a_mapped_file_of_other_bytes_is_refused(copy: Path) -> None:
    folder, path = TierFolder.open(copy, "cloud"), copy / "cloud" / "weights.bin"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DamagedFile, match="the contents are not those"), folder.mapped("weights.bin"):
        raise AssertionError("it was given")


def test_a_mapped_file_that_is_changed_while_it_is_used_is_refused(copy: Path) -> None:
    folder, path = TierFolder.open(copy, "cloud"), copy / "cloud" / "weights.bin"
    changed = pytest.raises(DamagedFile, match="changed while it was loaded")
    with changed, folder.mapped("weights.bin"), path.open("r+b") as file:
        file.write(b"\xff")


def test_a_folder_without_a_bundle_says_so(tmp_path: Path) -> None:
    with pytest.raises(DamagedFile, match="is this a bundle"):
        TierFolder.open(tmp_path, "edge")


def test_a_model_that_the_engine_cannot_load_is_damaged(copy: Path) -> None:
    path = copy / "edge" / MANIFEST
    manifest = Manifest.model_validate_json(path.read_bytes())
    (copy / "edge" / "model.onnx").write_bytes(b"nonsense")
    entry = FileEntry(size=8, sha256=hashlib.sha256(b"nonsense").hexdigest())
    edge = manifest.serving.files["edge"] | {"model.onnx": entry}
    serving = manifest.serving.model_copy(update={"files": manifest.serving.files | {"edge": edge}})
    forged = manifest.model_copy(update={"serving": serving, "serving_digest": serving.digest()})
    path.write_text(forged.model_dump_json())
    with pytest.raises(DamagedFile, match=r"model\.onnx"):
        Shard.load(TierFolder.open(copy, "edge"))


def test_tiers_of_different_bundles_do_not_make_a_monolith(copy: Path, attending_bundle: Path) -> None:
    shutil.rmtree(copy / "edge")
    shutil.copytree(attending_bundle / "edge", copy / "edge")
    with pytest.raises(DigestMismatch, match="different bundles"):
        Monolith.load(copy)
