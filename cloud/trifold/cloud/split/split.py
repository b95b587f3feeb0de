"""Splitting: from a checkpoint to a bundle, tensor by tensor."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from trifold.cloud.split.cuts import check_cuts
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
from trifold.shared.errors import ConfigError, DamagedFile
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

    Raises InvalidRequest for cuts that leave the core without a layer, ConfigError when `out` is no bundle or
    cannot be written.
    """
    check_cuts(cuts, len(checkpoint.spec.layers))
    text = _text(checkpoint.path)
    total = _values(checkpoint.spec) * (2 if train else 1)
    reading = Reading(progress, _STORED[checkpoint.spec.stored], total)
    with _replacing(out) as root:
        files: dict[Tier, dict[str, FileEntry]] = {}
        training: dict[Tier, dict[str, FileEntry]] = {}
        for tier in TIERS:
            (root / tier).mkdir(parents=True)
            source = Source(checkpoint, reading.add)
            files[tier] = _shard(source, tier, cuts, quantization, root / tier)
            if train:
                training[tier] = write_floats(source, tier, cuts, root / tier)
        files["device"] |= _write(text, root / "device")
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


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when all went well, and is gone otherwise.

    Raises ConfigError when `out` is something else than a bundle, or whatever writing fails on.
    """
    try:
        if out.exists() and not _is_bundle(out):
            raise ConfigError(f"{out}: exists and is not a bundle; name a new folder, or remove it")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            bundle, before = Path(folder) / "bundle", Path(folder) / "before"
            yield bundle
            if out.exists():
                out.rename(before)
            bundle.rename(out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror or error}") from error


def _is_bundle(out: Path) -> bool:
    """Or an empty folder, which is as good."""
    return (out / "cloud" / MANIFEST).exists() or (out.is_dir() and not any(out.iterdir()))


def _shard(
    source: Source, tier: Tier, cuts: Cuts, quantization: Quantization, folder: Path
) -> dict[str, FileEntry]:
    """model.onnx and weights.bin of a tier."""
    with closing(WeightsFile(folder / WEIGHTS)) as weights:
        model = build(source, tier, cuts, quantization, weights)
    (folder / MODEL).write_bytes(model)
    return {MODEL: _entry(model), WEIGHTS: weights.entry()}


def _text(path: Path) -> dict[str, bytes]:
    """What turns text into tokens and back."""
    try:
        return {name: (path / name).read_bytes() for name in _TEXT if (path / name).exists()}
    except OSError as error:
        raise DamagedFile(f"{error.filename}: cannot be read: {error.strerror}") from error


def _write(contents: Mapping[str, bytes], folder: Path) -> dict[str, FileEntry]:
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return {name: _entry(data) for name, data in contents.items()}


def _entry(data: bytes) -> FileEntry:
    return FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())
