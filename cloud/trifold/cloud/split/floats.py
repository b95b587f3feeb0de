"""Float slices for training: the tensors of a tier as they are in the checkpoint, under their own names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from trifold.cloud.split.graph.matrix import Source
from trifold.shared.bundle.manifest import CONFIG, FLOATS, Cuts, FileEntry, Tier
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.model.shapes import tensor_shapes

_DTYPES: Final[dict[str, tuple[str, Any]]] = {
    "float32": ("F32", np.float32),
    "float16": ("F16", np.float16),
    "bfloat16": ("BF16", ml_dtypes.bfloat16),
    "float8_e4m3fn": ("BF16", ml_dtypes.bfloat16),
}
"""By what the checkpoint stores: in which dtype a slice is written."""


def write_floats(source: Source, tier: Tier, cuts: Cuts, folder: Path) -> dict[str, FileEntry]:
    """Write float.safetensors and config.json of a tier, tensor by tensor."""
    shapes = _shapes(source.checkpoint, tier, cuts)
    name, dtype = _DTYPES[source.checkpoint.spec.stored]
    size = np.dtype(dtype).itemsize
    header: dict[str, Any] = {}
    offset = 0
    for tensor, shape in shapes.items():
        end = offset + size * prod(shape)
        header[tensor] = {"dtype": name, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with (folder / FLOATS).open("xb") as file:
        for data in _pieces(source, shapes, dtype, text):
            file.write(data)
            digest.update(data)
        written = FileEntry(size=file.tell(), sha256=digest.hexdigest())
    config = json.dumps(source.checkpoint.config, indent=2, sort_keys=True).encode()
    (folder / CONFIG).write_bytes(config)
    return {FLOATS: written, CONFIG: FileEntry(size=len(config), sha256=hashlib.sha256(config).hexdigest())}


def _pieces(source: Source, shapes: dict[str, tuple[int, ...]], dtype: Any, header: bytes) -> Iterator[bytes]:
    yield len(header).to_bytes(8, "little") + header
    for name in shapes:
        for piece in source.pieces(name):
            yield piece.astype(dtype).tobytes()


def _shapes(checkpoint: Checkpoint, tier: Tier, cuts: Cuts) -> dict[str, tuple[int, ...]]:
    """The tensors of a tier."""
    names, count = checkpoint.names, len(checkpoint.spec.layers)
    ends: set[str] = {"edge": {names.embedding}, "cloud": set(), "device": {names.final_norm, names.head}}[
        tier
    ]
    norms = [names.layer(layer).input_norm for layer in cuts.layers(tier, count)]
    layers = tuple(norm.removesuffix("input_layernorm.weight") for norm in norms)
    return {
        name: shape for name, shape in tensor_shapes(names).items() if name in ends or name.startswith(layers)
    }
