"""Random checkpoints for tests and benchmarks: small real ones of every family, and large ones fast."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.model.families.registry import family_of
from trifold.shared.model.fields import Fields
from trifold.shared.model.names import Names
from trifold.shared.model.shapes import tensor_shapes

COMMON: Final[dict[str, Any]] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
}

LATENT: Final[dict[str, Any]] = {
    **COMMON,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "routed_scaling_factor": 1.5,
}

EXPERTS: Final[dict[str, Any]] = {"num_experts": 8, "num_experts_per_tok": 2}

SMALL: Final[dict[str, dict[str, Any]]] = {
    "deepseek_v2": {**LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**LATENT, "num_nextn_predict_layers": 0},
    "llama": COMMON,
    "mixtral": {**COMMON, "num_local_experts": 8, "num_experts_per_tok": 2},
    "olmoe": {**COMMON, **EXPERTS, "pad_token_id": None},
    "qwen3": {**COMMON, "head_dim": 16},
    "qwen3_moe": {**COMMON, **EXPERTS, "head_dim": 16, "moe_intermediate_size": 32},
}
"""A small config of every family, as keyword arguments of its transformers config class."""


def save_random(family: str, out: Path, *, seed: int = 0, shard_size: str = "1GB", **changes: Any) -> Path:
    """Write a checkpoint with random fp32 weights, made and saved by transformers; returns its folder."""
    return save(random_model(family, seed=seed, **changes), out, shard_size=shard_size)


def random_model(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """A transformers model of a family's small config, with random weights that all make a difference."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SMALL[family], **changes})
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    for index, layer in enumerate(model.model.layers):
        if index % changes.get("moe_layer_freq", 1):
            # A key that DeepSeek's own code knows and transformers does not.
            layer.mlp = type(model.model.layers[0].mlp)(config)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                tensor.normal_(1.0, 0.2)
            elif name.endswith("bias"):
                tensor.normal_(0.0, 0.2)
            elif tensor.ndim >= 2:
                tensor.normal_(0.0, 1.5 / tensor.shape[-1] ** 0.5)
    return model.eval()


def save(model: Any, out: Path, *, shard_size: str = "1GB") -> Path:
    """Save a transformers model and a tokenizer; returns the folder."""
    model.save_pretrained(out, max_shard_size=shard_size)
    write_tokenizer(out, model.config.vocab_size)
    return out


def save_fp8(source: Path, out: Path, block: tuple[int, int] = (32, 16)) -> Path:
    """Write `source` again, the matrices of its layers in block-wise fp8, as DeepSeek-V3 is published."""
    checkpoint = Checkpoint.open(source)
    tensors: dict[str, NDArray[Any]] = {}
    for name in tensor_shapes(checkpoint.names):
        values = checkpoint.read(name)
        if not name.endswith("_proj.weight"):
            tensors[name] = values
            continue
        padded = np.pad(values, [(0, -size % step) for size, step in zip(values.shape, block, strict=True)])
        blocks = padded.reshape(padded.shape[0] // block[0], block[0], -1, block[1])
        scales = np.abs(blocks).max(axis=(1, 3)) / 448
        scaled = (blocks / scales[:, None, :, None]).reshape(padded.shape)
        tensors[name] = scaled[: values.shape[0], : values.shape[1]].astype(ml_dtypes.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scales.astype(np.float32)
    out.mkdir(parents=True)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    write_json(out / "config.json", {**checkpoint.config, "quantization_config": quantization})
    with (out / "model.safetensors").open("wb") as file:
        file.write(header({name: (dtype_name(t), t.shape) for name, t in tensors.items()}))
        file.writelines(t.tobytes() for t in tensors.values())
    write_tokenizer(out, checkpoint.spec.vocab)
    return out


def generate(config: dict[str, Any], out: Path, *, seed: int = 0, shard_bytes: int = 1 << 30) -> Path:
    """Write a bf16 checkpoint of any size, tensor by tensor and without torch; returns its folder.

    `config` is what config.json shall say. Weights have a magnitude of about 1/sqrt(inputs), random signs and
    random fractions; norms are 1, biases 0.
    """
    out.mkdir(parents=True)
    write_json(out / "config.json", {**config, "torch_dtype": "bfloat16"})
    family = family_of(Fields(config))
    shapes = tensor_shapes(Names(family.spec(), family.layout()))
    files = list(_shards(shapes, shard_bytes))
    rng = np.random.default_rng(seed)
    places = {}
    for number, names in enumerate(files, start=1):
        file_name = f"model-{number:05}-of-{len(files):05}.safetensors"
        places.update(dict.fromkeys(names, file_name))
        with (out / file_name).open("wb") as file:
            file.write(header({name: ("BF16", shapes[name]) for name in names}))
            file.writelines(_bf16(name, shapes[name], rng) for name in names)
    total = sum(2 * prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(out / "model.safetensors.index.json", index)
    write_tokenizer(out, config["vocab_size"])
    return out


def write_tokenizer(out: Path, vocab: int) -> None:
    """A byte-level tokenizer of at least 258 tokens: 256 bytes, <s>, </s>, fillers for the rest."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    extra = ["<s>", "</s>", *(f"<filler {index}>" for index in range(vocab - 258))]
    tokens = {token: index for index, token in enumerate([*alphabet, *extra])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(out / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    special = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2))


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of the JSON object in a file."""
    write_json(path, {**json.loads(path.read_text()), **changes})


def header(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The head of a safetensors file that holds these (dtype, shape), in this order."""
    entries, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * _SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def dtype_name(array: NDArray[Any]) -> str:
    return {"float32": "F32", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}[array.dtype.name]


_SIZES: Final = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8}


def _shards(shapes: dict[str, tuple[int, ...]], most: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + 2 * prod(shape) > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * prod(shape)
    yield names


def _bf16(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> bytes:
    if len(shape) == 1:
        return np.full(shape, float("norm" in name), ml_dtypes.bfloat16).tobytes()
    # Sign and fraction are random; the exponent puts every value within [1, 2) of a power of two.
    exponent = 127 - round(np.log2(1.5 * shape[-1] ** 0.5))
    bits = rng.integers(0, 1 << 16, prod(shape), np.uint16)
    return ((bits & 0x807F) | np.uint16(exponent << 7)).tobytes()
