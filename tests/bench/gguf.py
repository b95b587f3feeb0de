"""A checkpoint as GGUF q8_0, by llama.cpp's converter: `python -m tests.bench.gguf SOURCE CHECKPOINT OUT`.

SOURCE is a source tree of llama.cpp, such as the source distribution of llama-cpp-python holds. The random
checkpoints have a tokenizer that llama.cpp does not know; it is left out, as only token ids are fed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main() -> None:
    source, checkpoint, out = map(Path, sys.argv[1:])
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    base: Any = importlib.import_module("conversion.base")
    for family in ("qwen", "deepseek"):
        importlib.import_module(f"conversion.{family}")
    for model in _subclasses(base.TextModel):
        model.set_vocab = _set_vocab
    sys.argv = ["convert", str(checkpoint), "--outtype", "q8_0", "--outfile", str(out)]
    importlib.import_module("convert_hf_to_gguf").main()


def _set_vocab(converter: Any) -> None:
    converter._set_vocab_none()
    if "deepseek" not in converter.hparams["model_type"]:  # whose converter says it by itself
        converter.gguf_writer.add_vocab_size(converter.hparams["vocab_size"])


def _subclasses(parent: Any) -> Iterator[Any]:
    for child in parent.__subclasses__():
        yield child
        yield from _subclasses(child)


if __name__ == "__main__":
    main()
