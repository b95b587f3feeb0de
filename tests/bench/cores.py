"""The core's engines on trifold-nano, and on layers of two real shapes with random weights.

Of the large ones a few layers stand for all, which are alike: a step of the whole core takes as many times
longer as it has more of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.bench.nano import CHECKPOINT
from tests.checkpoints import generate
from trifold.cloud.bench.core import Speed
from trifold.cloud.bench.machine import Machine
from trifold.cloud.bench.report import Report

LAYERS: Final = 4
"""In the core of a large shape; edge and device have one each."""
CONTEXT: Final = 64
"""Positions that a session holds."""

_COMMON: Final[dict[str, Any]] = {
    "vocab_size": 1024,
    "hidden_size": 2048,
    "num_hidden_layers": LAYERS + 2,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
}

SHAPES: Final[dict[str, dict[str, Any]]] = {
    "Qwen3-30B-A3B": {
        **_COMMON,
        "model_type": "qwen3_moe",
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rope_theta": 1e6,
    },
    "DeepSeek-V2-Lite": {
        **_COMMON,
        "model_type": "deepseek_v2",
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "n_group": 1,
        "topk_group": 1,
        "moe_layer_freq": 1,
        "rope_theta": 1e4,
    },
}
"""As their publishers have them, but for the layers and the vocabulary, which the core does not see."""

ENGINES: Final = (("onnxruntime",), ("torch", "--weights", "bf16"))


def main() -> None:
    with _folder() as root:
        _compare("trifold-nano", _split(CHECKPOINT, root / "nano"))
    for name, config in SHAPES.items():
        with _folder() as root:  # of 20 GB, so one after the other
            checkpoint = generate(config, root / name)
            bundle = _split(checkpoint, root / f"{name}-bundle", "--cuts", f"1/{LAYERS + 1}")
            _compare(f"{LAYERS} layers of {name}", bundle)


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder:
        yield Path(folder)


def _split(checkpoint: Path, out: Path, *options: str) -> Path:
    _trifold("split", str(checkpoint), "--out", str(out), "--train", *options)
    return out


def _compare(name: str, bundle: Path) -> None:
    """A table for each engine, and a plot of both."""
    print(f"\n{name}\n", flush=True)
    lines = {}
    for engine in ENGINES:
        command = "bench", "core", str(bundle), "--context", str(CONTEXT), "--engine", *engine, "--json"
        told = json.loads(_trifold(*command))
        decode = {int(count): Speed(**speed) for count, speed in told["decode"].items()}
        machine, prefill = Machine(**told["machine"]), Speed(**told["prefill"])
        print(Report(told["engine"], CONTEXT, machine, decode, prefill).text() + "\n", flush=True)
        lines[engine[0]] = {count: speed.rows_per_second for count, speed in decode.items()}
    print("\n".join(_plot(f"{name}: rows a second", lines)), flush=True)


def _plot(title: str, lines: Mapping[str, Mapping[int, float]]) -> Iterator[str]:
    """For Mermaid, which pages of Markdown show as a chart."""
    sessions = ", ".join(str(count) for count in next(iter(lines.values())))
    yield from ("```mermaid", "xychart-beta", f'    title "{title} ({", ".join(lines)})"')
    yield f'    x-axis "sessions together" [{sessions}]'
    yield '    y-axis "rows a second"'
    for line in lines.values():
        yield f"    line [{', '.join(f'{value:.0f}' for value in line.values())}]"
    yield "```"


def _trifold(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "trifold.shared.cli.main", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"`trifold {' '.join(arguments)}` failed:\n{done.stderr}")
    return done.stdout
