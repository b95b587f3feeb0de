"""How far a split model is from transformers: configurations of every family, and the measurement."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from tests.checkpoints import SMALL, random_model, save, save_fp8
from trifold.cloud.split.split import split
from trifold.shared.bundle.manifest import Cuts
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.model.spec import MoeFfn
from trifold.shared.runtime.monolith import Monolith

Array = NDArray[np.floating[Any]]

PREFILL: Final = 88
DECODE: Final = 24
TIE: Final = 1e-5

YARN: Final = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3: Final = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR: Final = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}

FEATURES: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "deepseek_v2": {
        "groups": {},
        "greedy": {"topk_method": "greedy", "q_lora_rank": None},
        "yarn": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}, "q_lora_rank": None},
        "bias": {"attention_bias": True},
        "wide values": {
            "v_head_dim": 48,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "n_shared_experts": 1,
        },
        "all experts": {"first_k_dense_replace": 0, "routed_scaling_factor": 16.0, "num_experts_per_tok": 4},
    },
    "deepseek_v3": {
        "groups": {},
        "plain queries": {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
        "yarn": {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        "two scales": {"rope_parameters": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.6, "beta_fast": 8}},
        "halves": {"rope_interleave": False, "attention_bias": True},
        "bias": {"attention_bias": True, "q_lora_rank": None, "tie_word_embeddings": True},
        "raw weights": {"norm_topk_prob": False, "num_experts_per_tok": 1, "n_shared_experts": 1},
        "alternating": {"moe_layer_freq": 2, "n_routed_experts": 16},
        "odd sizes": {"qk_rope_head_dim": 12, "qk_nope_head_dim": 20, "v_head_dim": 28, "kv_lora_rank": 40},
        "published heads": {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
        "fp8": {"fp8": True},
    },
    "llama": {
        "plain": {},
        "llama3": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
        "bias": {"attention_bias": True, "mlp_bias": True},
        "linear": {"rope_parameters": LINEAR, "head_dim": 40},
        "yarn": {"rope_parameters": YARN, "num_key_value_heads": 1},
        "every head": {"num_key_value_heads": 4, "head_dim": 12, "rms_norm_eps": 1e-3},
        "wide heads": {"head_dim": 160},
    },
    "qwen3": {
        "plain": {},
        "yarn": {"rope_parameters": {**YARN, "attention_factor": 1.2}, "tie_word_embeddings": True},
        "bias": {"attention_bias": True, "head_dim": 32},
        "narrow heads": {"head_dim": 12, "num_key_value_heads": 1},
    },
    "qwen3_moe": {
        "plain": {"norm_topk_prob": True},
        "raw weights": {"norm_topk_prob": False, "num_experts_per_tok": 3},
        "every second": {"decoder_sparse_step": 2, "norm_topk_prob": True, "attention_bias": True},
        "some dense": {"mlp_only_layers": [0, 2], "rope_parameters": YARN, "num_experts": 16},
        "tied": {"tie_word_embeddings": True, "num_experts_per_tok": 1, "head_dim": 24},
        "fp8": {"fp8": True, "norm_topk_prob": True},
    },
    "mixtral": {
        "plain": {},
        "head_dim": {"head_dim": 24, "num_experts_per_tok": 3},
        "few experts": {"num_local_experts": 2, "num_experts_per_tok": 2, "tie_word_embeddings": True},
        "linear": {"rope_parameters": LINEAR, "num_local_experts": 5},
    },
    "olmoe": {
        "plain": {},
        "clipped": {"clip_qkv": 0.9, "norm_topk_prob": True},
        "every head": {"num_key_value_heads": 4, "num_experts": 16, "num_experts_per_tok": 5},
        "bias": {"attention_bias": True, "rope_parameters": YARN, "clip_qkv": 2.0},
    },
}
"""What each configuration has; its sizes are random."""

SIZES: Final = 2
"""How many random sizes each of them is tried with."""

Case = tuple[str, str, int]
CASES: Final[list[Case]] = [
    (family, name, sizes) for family in FEATURES for name in FEATURES[family] for sizes in range(SIZES)
]
"""Family, feature, number of the random sizes."""


@dataclass(frozen=True)
class Parity:
    """`errors` of each position, and the positions where two experts tie in some layer."""

    errors: Array
    ties: tuple[int, ...]

    @property
    def worst(self) -> float:
        """Among the positions where no experts tie."""
        return float(np.delete(self.errors, self.ties).max())


def measure(case: Case, folder: Path) -> Parity:
    """Split a checkpoint and compare its logits with those of transformers.

    PREFILL positions run at once and DECODE ones one by one, in both. The error of a position is the largest
    difference of a logit over the largest logit.
    """
    family, name, _ = case
    rng = random.Random(str(case))
    features = {**_sizes(rng, family), **FEATURES[family][name]}
    reference, source = _checkpoint(family, features, rng, folder)
    checkpoint = Checkpoint.open(source)
    layers = len(checkpoint.spec.layers)
    first = rng.randrange(layers)
    cuts = Cuts(edge=first, cloud=rng.randint(first + 1, layers))
    split(checkpoint, cuts, folder / "bundle", quantization="none", codec="none")
    monolith = Monolith.load(folder / "bundle", threads=1)

    tokens = np.array([rng.randrange(checkpoint.spec.vocab) for _ in range(PREFILL + DECODE)])
    expected, logits_of_routers = _reference(reference, tokens)
    session = monolith.session(len(tokens))
    found = [session.feed(tokens[:PREFILL], 0)]
    found += [session.feed(tokens[at : at + 1], at) for at in range(PREFILL, len(tokens))]
    errors = np.abs(np.concatenate(found) - expected).max(axis=1) / np.abs(expected).max(axis=1)
    return Parity(errors, _ties(checkpoint, logits_of_routers))


def _sizes(rng: random.Random, family: str) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "hidden_size": rng.choice([48, 64, 80, 96, 128]),
        "intermediate_size": rng.choice([40, 64, 72, 96]),
        "vocab_size": rng.randrange(260, 400),
        "num_hidden_layers": rng.randint(3, 5),
        "rms_norm_eps": rng.choice([1e-6, 1e-5]),
    }
    if "moe_intermediate_size" in SMALL[family]:
        sizes["moe_intermediate_size"] = rng.choice([24, 32, 40, 64])
    return sizes


def _checkpoint(family: str, features: dict[str, Any], rng: random.Random, folder: Path) -> tuple[Any, Path]:
    """The transformers model, and the folder of the same weights for us."""
    fp8 = features.pop("fp8", False)
    model = random_model(family, seed=rng.randrange(2**31), **features)
    source = save(model, folder / "checkpoint", shard_size="100KB")
    if not fp8:
        return model, source
    from transformers import AutoModelForCausalLM

    source = save_fp8(source, folder / "fp8", (32, 24))
    _dequantize(source, folder / "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    return model, source


def _dequantize(fp8: Path, plain: Path) -> None:
    """Put the values that the fp8 checkpoint stands for into the plain one."""
    from safetensors.torch import load_file, save_file

    stored = load_file(fp8 / "model.safetensors")
    for file in plain.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            rows, columns = tensor.shape[0], tensor.shape[-1]
            tensors[name] = stored[name].float()
            if name + "_scale_inv" in stored:
                scales = stored[name + "_scale_inv"].repeat_interleave(32, 0).repeat_interleave(24, 1)
                tensors[name] *= scales[:rows, :columns]
        save_file(tensors, file, {"format": "pt"})


def _reference(model: Any, tokens: NDArray[np.int64]) -> tuple[Array, list[Array]]:
    """Logits (positions, vocab) of transformers with its own KV cache, and those of each router."""
    routers = [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]
    seen: list[list[Array]] = [[] for _ in routers]
    for router, store in zip(routers, seen, strict=True):
        router.register_forward_hook(lambda _, __, out, store=store: store.append(out[0].numpy()))
    chunks = torch.from_numpy(tokens)[None].split((PREFILL, *[1] * DECODE), dim=1)  # type: ignore[no-untyped-call]
    logits, cache = [], None
    with torch.no_grad():
        for chunk in chunks:
            out = model(chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[0].numpy())
    return np.concatenate(logits), [np.concatenate(store) for store in seen]


def _ties(checkpoint: Checkpoint, routers: list[Array]) -> tuple[int, ...]:
    """Positions where, in some layer, the choice of experts or groups hangs on less than TIE."""
    spec, names = checkpoint.spec, checkpoint.names
    moe_layers = [index for index, layer in enumerate(spec.layers) if isinstance(layer.ffn, MoeFfn)]
    tied = np.zeros(PREFILL + DECODE, bool)
    for index, logits in zip(moe_layers, routers, strict=True):
        moe, at = spec.layers[index].ffn, names.layer(index).ffn
        bias = getattr(at, "router_bias", None)
        assert isinstance(moe, MoeFfn)
        tied |= _margin(moe, logits, checkpoint.read(bias) if bias else np.float32(0)) < TIE
    return tuple(np.flatnonzero(tied).tolist())


def _margin(moe: MoeFfn, logits: Array, bias: Array | np.float32) -> Array:
    """How far the last chosen expert (or group) is above the first one that is not, for each row."""
    if moe.scoring == "sigmoid":
        scores = 1 / (1 + np.exp(-logits)) + bias
    else:
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores = odds / odds.sum(axis=1, keepdims=True)
    groups = np.sort(scores.reshape(len(scores), moe.groups, -1), axis=2)
    of_groups = groups[:, :, -1] if moe.group_score == "max" else groups[:, :, -2:].sum(axis=2)
    limit = np.sort(of_groups, axis=1)[:, -moe.top_groups]
    inside = np.where((of_groups >= limit[:, None])[:, :, None], groups, -np.inf).reshape(scores.shape)
    return np.minimum(_gap(of_groups, moe.top_groups), _gap(inside, moe.top_k))


def _gap(scores: Array, chosen: int) -> Array:
    if chosen == scores.shape[1]:
        return np.full(len(scores), np.inf, np.float32)
    ordered = np.sort(scores, axis=1)[:, ::-1]
    return ordered[:, chosen - 1] - ordered[:, chosen]
