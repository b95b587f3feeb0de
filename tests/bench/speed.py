"""Speed, side by side: the monolith against llama.cpp and transformers.

llama.cpp takes part when LLAMA_CPP_SOURCE names its source tree and llama-cpp-python is installed: see
docs/benchmarks.md. Everything runs in turn, several times over, and the medians of the turns are compared.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.bench.engines import DECODE, PROMPT, THREADS
from tests.bench.shapes import SHAPES
from tests.checkpoints import generate
from trifold.cloud.split.plan import plan
from trifold.cloud.split.split import split
from trifold.shared.model.checkpoint import Checkpoint

TURNS: Final = 5


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder:
        root = Path(folder)
        checkpoints = {name: generate(config, root / name) for name, config in SHAPES.items()}
        bundles = {name: _split(path, root / f"{name}-bundle") for name, path in checkpoints.items()}
        for name, checkpoint in checkpoints.items():
            _against_others(name, checkpoint, bundles[name], root)


def _split(path: Path, out: Path) -> Path:
    checkpoint = Checkpoint.open(path)
    split(checkpoint, plan(checkpoint.spec).cuts, out)
    return out


def _against_others(name: str, checkpoint: Path, bundle: Path, root: Path) -> None:
    models = {"monolith": bundle, "transformers": checkpoint}
    if source := os.environ.get("LLAMA_CPP_SOURCE"):
        models["llama_cpp"] = _gguf(source, checkpoint, root / f"{name}.gguf")
    turns: dict[str, list[dict[str, float]]] = {engine: [] for engine in models}
    for _ in range(TURNS):
        for engine, model in models.items():
            turns[engine].append(json.loads(_run("tests.bench.engines", engine, str(model))))
    print(f"\n{name}, {THREADS} threads: prefill of {PROMPT} tokens, decode of {DECODE}\n")
    print("| engine | decode, ms a token | prefill, ms | decode, ratio to Trifold | prefill, ratio |")
    print("|---|---|---|---|---|")
    ours = {
        what: statistics.median(turn[what] for turn in turns["monolith"]) for what in ("decode", "prefill")
    }
    for engine, results in turns.items():
        theirs = {what: statistics.median(turn[what] for turn in results) for what in ours}
        ratios = [f"{theirs[what] / ours[what]:.2f}" for what in ours]
        print(
            f"| {engine} | {theirs['decode']:.2f} | {theirs['prefill']:.1f} | {' | '.join(ratios)} |",
            flush=True,
        )


def _gguf(source: str, checkpoint: Path, out: Path) -> Path:
    bare = out.with_suffix(".bare")
    bare.mkdir()
    for file in checkpoint.iterdir():
        if not file.name.startswith("tokenizer"):
            (bare / file.name).symlink_to(file)
    _run("tests.bench.gguf", source, str(bare), str(out))
    return out


def _run(module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{module} {' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
