"""Opening checkpoints: what is read, and how a damaged one is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoints import edit_json, generate, header, save_fp8, save_random
from trifold.shared.errors import DamagedFile, UnsupportedModel
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.model.safetensors import DTYPES, SafetensorsFile
from trifold.shared.model.shapes import tensor_shapes

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 260,
    "hidden_size": 32,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(CONFIG, tmp_path_factory.mktemp("sharded") / "it", shard_bytes=20_000)


@pytest.fixture(scope="module")
def from_transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random("deepseek_v3", tmp_path_factory.mktemp("random"), shard_size="100KB")


@pytest.fixture
def folder(sharded: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(sharded, tmp_path / "copy")


def refusal(folder: Path) -> str:
    with pytest.raises(DamagedFile) as caught:
        Checkpoint.open(folder)
    return str(caught.value)


def a_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def test_tensors_of_a_sharded_checkpoint_are_those_that_torch_reads(from_transformers: Path) -> None:
    from safetensors.torch import load_file

    shards = [load_file(file) for file in from_transformers.glob("*.safetensors")]
    stored = {name: tensor for shard in shards for name, tensor in shard.items()}
    checkpoint = Checkpoint.open(from_transformers)
    assert len(shards) > 3
    assert tensor_shapes(checkpoint.names).keys() == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(checkpoint.read(name), tensor.numpy())


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "F8_E8M0"])
def test_every_value_of_a_dtype_is_read_exactly(name: str, tmp_path: Path) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).repeat(2)
    values = bits.view(DTYPES[name]).reshape(-1, 4)
    path = tmp_path / "one.safetensors"
    path.write_bytes(header({"it": (name, values.shape)}) + values.tobytes())
    read = SafetensorsFile(path).rows("it", 3, len(values) - 5)
    np.testing.assert_array_equal(read, values[3:-5].astype(np.float32))


def test_fp8_weights_are_multiplied_by_the_scales_of_their_blocks(
    from_transformers: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    height, width = 24, 20  # neither divides the shapes
    folder = save_fp8(from_transformers, tmp_path / "fp8", (height, width))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.spec.stored == "float8_e4m3fn"
    stored = load_file(folder / "model.safetensors")
    scaled = [name for name in stored if name + "_scale_inv" in stored]
    assert scaled
    for name in scaled:
        scales = stored[name + "_scale_inv"].repeat_interleave(height, 0).repeat_interleave(width, 1)
        rows, columns = stored[name].shape
        expected = (stored[name].float() * scales[:rows, :columns]).numpy()
        np.testing.assert_array_equal(checkpoint.read(name), expected)
        np.testing.assert_array_equal(checkpoint.rows(name, 5, rows - 3), expected[5 : rows - 3])


def test_what_a_token_ends_with_comes_from_generation_config_where_that_says_so(folder: Path) -> None:
    edit_json(folder / "config.json", eos_token_id=7)
    assert Checkpoint.open(folder).spec.eos_ids == (7,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [8, 9], "bos_token_id": null}')
    assert Checkpoint.open(folder).spec.eos_ids == (8, 9)


def test_the_multi_token_prediction_layer_is_skipped(from_transformers: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(from_transformers, tmp_path / "copy")
    extra = folder / "extra.safetensors"
    extra.write_bytes(header({"model.layers.4.eh_proj.weight": ("F32", (2, 2))}) + bytes(16))
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**places, "model.layers.4.eh_proj.weight": extra.name})
    assert len(Checkpoint.open(folder).spec.layers) == 4


def test_a_missing_config_is_refused_by_name(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder)


def test_a_missing_shard_is_refused_by_file_name(folder: Path) -> None:
    shard = a_shard(folder)
    shard.unlink()
    assert shard.name in refusal(folder)


@pytest.mark.parametrize("kept", [0, 5, 40, -100, -1])
def test_a_shard_that_was_cut_short_is_refused_by_file_name(folder: Path, kept: int) -> None:
    shard = a_shard(folder)
    shard.write_bytes(shard.read_bytes()[:kept])
    assert shard.name in refusal(folder)


def test_a_shard_that_is_too_long_is_refused_by_file_name(folder: Path) -> None:
    shard = a_shard(folder)
    shard.write_bytes(shard.read_bytes() + b"\0")
    assert shard.name in refusal(folder)


def test_a_shard_that_is_no_safetensors_file_is_refused_by_file_name(folder: Path) -> None:
    shard = a_shard(folder)
    shard.write_bytes(b"<html>not found</html>" * 50)
    assert shard.name in refusal(folder)


def test_an_index_entry_that_points_to_nothing_is_refused_by_tensor_and_file(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    elsewhere = a_shard(folder).name
    places["model.norm.weight"] = elsewhere
    edit_json(index, weight_map=places)
    message = refusal(folder)
    assert "model.norm.weight" in message
    assert elsewhere in message


@pytest.mark.parametrize("path", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "", ".."])
def test_an_index_that_points_outside_the_folder_is_refused(folder: Path, path: str) -> None:
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**places, "model.norm.weight": path})
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes(header({"model.norm.weight": ("F32", (32,))}) + bytes(128))
    assert "index" in refusal(folder)


def test_a_missing_tensor_is_refused_by_name(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    del places["model.layers.1.mlp.experts.3.up_proj.weight"]
    edit_json(index, weight_map=places)
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in refusal(folder)


def test_a_tensor_of_a_shape_that_the_config_denies_is_refused_by_name(folder: Path) -> None:
    edit_json(folder / "config.json", moe_intermediate_size=24)
    message = refusal(folder)
    assert "experts.0.gate_proj" in message
    assert "[24, 32]" in message


def test_a_tensor_without_a_place_in_the_model_is_refused_by_name(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=2)
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.2\."):
        Checkpoint.open(folder)


def test_fp8_without_its_scales_is_refused_by_tensor(from_transformers: Path, tmp_path: Path) -> None:
    folder = save_fp8(from_transformers, tmp_path / "fp8")
    quantization = Checkpoint.open(folder).config["quantization_config"]
    edit_json(folder / "config.json", quantization_config=None)
    with pytest.raises(UnsupportedModel, match=r"q_a_proj"):
        Checkpoint.open(folder)
    edit_json(folder / "config.json", quantization_config={**quantization, "weight_block_size": [8, 8]})
    assert "_scale_inv" in refusal(folder)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda entry: entry.update(shape=[-1, 4]),
        lambda entry: entry.update(shape=[3, 5]),
        lambda entry: entry.update(data_offsets=[0, 10**12]),
        lambda entry: entry.update(data_offsets=[64, 0]),
        lambda entry: entry.update(data_offsets="ab"),
        lambda entry: entry.pop("dtype"),
        lambda entry: entry.update(dtype=[]),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(
    spoil: Callable[[dict[str, object]], None], tmp_path: Path
) -> None:
    entry: dict[str, object] = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
    spoil(entry)
    text = json.dumps({"it": entry}).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    with pytest.raises(DamagedFile, match=r"bad\.safetensors"):
        SafetensorsFile(path)


@given(at=st.integers(0, 400), byte=st.integers(0, 255))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_byte_of_a_header_may_be_wrong_without_another_error(tmp_path: Path, at: int, byte: int) -> None:
    whole = header({"a": ("F32", (4, 4)), "b": ("BF16", (2, 2, 3)), "c": ("I64", (1,))}) + bytes(64 + 24 + 8)
    spoiled = bytearray(whole)
    spoiled[at % len(whole)] = byte
    path = tmp_path / "x.safetensors"
    path.write_bytes(spoiled)
    with suppress(DamagedFile):
        entries = SafetensorsFile(path).entries.values()
        assert all(0 < entry.start <= entry.stop <= len(whole) for entry in entries)
