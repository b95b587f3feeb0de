"""Splitting a 6 GB checkpoint: peak anonymous memory and seconds."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from tests.checkpoints import generate
from tests.memory import anonymous

CONFIG: Final[dict[str, Any]] = {
    "model_type": "qwen3_moe",
    "vocab_size": 65536,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 6,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
"""About 3 billion parameters, 6 GB as bf16."""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder:
        checkpoint = generate(CONFIG, Path(folder) / "checkpoint")
        size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        print("| checkpoint | quantization | bundle | seconds | peak anonymous memory |")
        print("|---|---|---|---|---|")
        for quantization in ("int8", "int4"):
            bundle = Path(folder) / quantization
            seconds, peak = _watch("split", str(checkpoint), "--out", str(bundle), "--quant", quantization)
            written = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
            row = [f"{size / 1e9:.2f} GB", quantization, f"{written / 1e9:.2f} GB", f"{seconds:.0f}"]
            print(f"| {' | '.join([*row, f'{peak / 2**20:,.0f} MiB'])} |", flush=True)


def _watch(*arguments: str) -> tuple[float, int]:
    """Runs `trifold ARGUMENTS`; its seconds, and the most anonymous memory it had (bytes, every 20 ms)."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "trifold.shared.cli.main", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.02)
    if process.returncode:
        assert process.stderr
        sys.exit(f"`trifold {' '.join(arguments)}` failed:\n{process.stderr.read()}")
    return time.monotonic() - began, peak


if __name__ == "__main__":
    main()
