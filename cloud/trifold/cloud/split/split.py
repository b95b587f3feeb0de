"""Splitting: from a checkpoint to a bundle, tensor by tensor."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from trifold.cloud.split.floats import write_floats
from trifold.cloud.split.graph.matrix import Source
from trifold.cloud.split.graph.shard import build
from trifold.cloud.split.graph.weights import WEIGHTS, WeightsFile
from trifold.shared.bundle.folder import MANIFEST
from trifold.shared.bundle.manifest import (
    TIERS,
    CodecName,
    Cuts,
    FileEntry,
    Manifest,
    Quantization,
    Serving,
    Tier,
)
from trifold.shared.errors import ConfigError, InvalidRequest
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.model.parameters import of_embedding, of_head, of_layer
from trifold.shared.model.spec import ModelSpec

Progress = Callable[[int, int], None]
"""Is told bytes of the checkpoint read, and to read in all."""

MODEL: Final = "model.onnx"

_STORED: Final = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
"""Bytes of a value."""

_TEXT: Final = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
"""What the device needs to make tokens of text and text of tokens, as far as the checkpoint has it."""


def split(
    checkpoint: Checkpoint,
    cuts: Cuts,
    out: Path,
    *,
    quantization: Quantization = "int8",
    codec: CodecName = "int8",
    train: bool = False,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """Write the bundle `out`; with `train` also each tier's float weights. Equal inputs give equal digests.

    `out` appears when all is written, and replaces an older bundle then. Memory stays small: no more than a
    piece of a tensor, or one expert, is read at a time.

    Raises InvalidRequest for cuts that leave the core without a layer, ConfigError when `out` is no bundle.
    """
    _check(checkpoint.spec, cuts, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    total = _values(checkpoint.spec) * (2 if train else 1)
    reading = Reading(progress, _STORED[checkpoint.spec.stored], total)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        root = Path(folder) / "bundle"
        files: dict[Tier, dict[str, FileEntry]] = {}
        training: dict[Tier, dict[str, FileEntry]] = {}
        for tier in TIERS:
            (root / tier).mkdir(parents=True)
            source = Source(checkpoint, reading.add)
            files[tier] = _shard(source, tier, cuts, quantization, root / tier)
            if train:
                training[tier] = write_floats(source, tier, cuts, root / tier)
        files["device"] |= _text(checkpoint.path, root / "device")
        serving = Serving(
            spec=checkpoint.spec, cuts=cuts, quantization=quantization, codec=codec, files=files
        )
        manifest = Manifest(
            producer=f"trifold {version('trifold')}",
            serving_digest=serving.digest(),
            serving=serving,
            training=training,
        )
        for tier in TIERS:
            (root / tier / MANIFEST).write_text(manifest.model_dump_json(indent=1))
        _put(root, out, Path(folder) / "before")
    return manifest


@dataclass
class Reading:
    """Counts the values that have been read, of `size` bytes each."""

    progress: Progress
    size: int
    total: int
    done: int = 0

    def add(self, values: int) -> None:
        self.done += values
        self.progress(self.done * self.size, self.total * self.size)


def _values(spec: ModelSpec) -> int:
    """How many values the shards are made from."""
    layers = sum(of_layer(layer, spec.hidden).total for layer in spec.layers)
    return of_embedding(spec).total + layers + of_head(spec).total


def _check(spec: ModelSpec, cuts: Cuts, out: Path) -> None:
    if not cuts.edge < cuts.cloud <= len(spec.layers):
        count = len(spec.layers)
        raise InvalidRequest(
            f"cuts before layers {cuts.edge} and {cuts.cloud} of {count}: "
            f"the first must be less than the second, and the second at most {count}"
        )
    if out.exists() and not (out / "cloud" / MANIFEST).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not a bundle; name a new folder, or remove it")


def _shard(
    source: Source, tier: Tier, cuts: Cuts, quantization: Quantization, folder: Path
) -> dict[str, FileEntry]:
    """model.onnx and weights.bin of a tier."""
    with closing(WeightsFile(folder / WEIGHTS)) as weights:
        model = build(source, tier, cuts, quantization, weights)
    (folder / MODEL).write_bytes(model)
    return {MODEL: _entry(model), WEIGHTS: weights.entry()}


def _text(path: Path, folder: Path) -> dict[str, FileEntry]:
    """Copies what turns text into tokens and back."""
    files = {}
    for name in _TEXT:
        if (path / name).exists():
            data = (path / name).read_bytes()
            (folder / name).write_bytes(data)
            files[name] = _entry(data)
    return files


def _entry(data: bytes) -> FileEntry:
    return FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _put(bundle: Path, out: Path, before: Path) -> None:
    """Moves the finished bundle to its place, out of which an older one goes first."""
    if out.exists():
        out.rename(before)
    bundle.rename(out)
