"""trifold-nano for the benchmarks: where it is, its held-out text, and bundles of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

CHECKPOINT: Final = Path(__file__).parents[2] / "models" / "trifold-nano"


def held_out() -> str:
    """Text that the model has not been trained on."""
    return (CHECKPOINT / "heldout.txt").read_text(encoding="utf-8")


def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def split_nano(out: Path, *options: str) -> Path:
    """Split it with `trifold split`; the folder of the bundle."""
    command = [sys.executable, "-m", "trifold.shared.cli.main", "split", str(CHECKPOINT), "--out", str(out)]
    subprocess.run([*command, *options], check=True, capture_output=True)
    return out
