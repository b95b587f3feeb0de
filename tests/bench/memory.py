"""Splitting a 6 GB checkpoint, and loading the core of what came out: peak anonymous memory and seconds."""

from __future__ import annotations

import hashlib
import select
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
        loads = []
        print("| checkpoint | quantization | bundle | seconds | peak anonymous memory |")
        print("|---|---|---|---|---|")
        for quantization in ("int8", "int4"):
            bundle = Path(folder) / quantization
            seconds, peak = _watch("split", str(checkpoint), "--out", str(bundle), "--quant", quantization)
            written = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
            row = [f"{size / 1e9:.2f} GB", quantization, f"{written / 1e9:.2f} GB", f"{seconds:.0f}"]
            print(f"| {' | '.join([*row, f'{peak / 2**20:,.0f} MiB'])} |", flush=True)
            loads.append(f"| {quantization} | {' | '.join(_load(bundle))} |")
        print("\n| core of | weights | to be read and hashed | ready after | peak anonymous memory |")
        print("|---|---|---|---|---|", *loads, sep="\n")


def _load(bundle: Path) -> tuple[str, ...]:
    """Size and floor of the core's weights; until `trifold cloud serve` is ready, self-test and all."""
    weights = bundle / "cloud" / "weights.bin"
    began = time.monotonic()
    with weights.open("rb") as file:
        hashlib.file_digest(file, "sha256")
    hashed = time.monotonic() - began
    seconds, peak = _watch("cloud", "serve", str(bundle), "--listen", "127.0.0.1:0")
    size = f"{weights.stat().st_size / 1e9:.2f} GB"
    return size, f"{hashed:.1f} s", f"{seconds:.1f} s", f"{peak / 2**20:,.0f} MiB"


def _watch(*arguments: str) -> tuple[float, int]:
    """Runs `trifold ARGUMENTS` until it ends or is ready, which it says on stdout.

    Its seconds, and the most anonymous memory it had (bytes, every 20 ms).
    """
    began = time.monotonic()
    command = [sys.executable, "-m", "trifold.shared.cli.main", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        peak, said = 0, b""
        while process.poll() is None and b" ready on " not in said:
            peak = max(peak, anonymous(process.pid))
            if select.select([process.stdout], [], [], 0.02)[0]:
                said = process.stdout.readline()
        seconds = time.monotonic() - began
        if process.returncode:
            sys.exit(f"`trifold {' '.join(arguments)}` failed:\n{process.stderr.read().decode()}")
        process.kill()
        return seconds, peak


if __name__ == "__main__":
    main()
