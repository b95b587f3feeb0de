"""Building adapter versions: LoRA factors merged into float slices, quantized as `split` quantizes them.

Merged rather than computed beside the weights at run time: a projection is no longer there by itself in the
graph of a shard, where those of one input are stacked and those of latent attention multiplied together.
And merged into floats: what a shard holds are products of projections, to which no update can be added.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from trifold.cloud.split.graph.matrix import Float, Source
from trifold.cloud.split.graph.shard import build
from trifold.cloud.split.graph.weights import WEIGHTS, WeightsFile
from trifold.cloud.split.split import MODEL
from trifold.shared import durable
from trifold.shared.bundle.adapter import ADAPTER, Adapter, Origin, adapter_digest
from trifold.shared.bundle.factors import LoraFactors
from trifold.shared.bundle.folder import REMEDY, TierFolder
from trifold.shared.bundle.manifest import CONFIG, FLOATS, FileEntry
from trifold.shared.bundle.store import AdapterStore, stores
from trifold.shared.errors import ConfigError, DamagedFile, DigestMismatch, InvalidRequest
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.model.fields import Fields
from trifold.shared.model.names import Names
from trifold.shared.model.safetensors import SafetensorsFile
from trifold.shared.model.shapes import tensor_shapes

_STAGING: Final = ".building."


@dataclass(frozen=True)
class AdaptedSource(Source):
    """Weights with the updates of LoRA factors in them."""

    factors: LoraFactors = field(kw_only=True)

    def rows(self, name: str, start: int, stop: int) -> Float:
        return self.factors.merged(name, super().rows(name, start, stop), start)


def add_version(bundle: Path, factors: LoraFactors, origin: Origin) -> str:
    """Builds the version of these factors in every tier that `bundle` has here, and returns its digest.

    `bundle` is its root, or the folder of edge or device. A version that is there already stays as it is,
    unless it is damaged: then it is built anew. Equal float slices and factors give equal weights.

    Raises ConfigError for a bundle that was split without --train, InvalidRequest naming a factor that has no
    place in the model or belongs to the core, DamagedFile naming an altered file of the bundle.
    """
    here = stores(bundle)
    checkpoints = [_slice(store.folder) for store in here]
    _check(factors, checkpoints[0].names, here[0].folder)
    digest = adapter_digest(here[0].folder.manifest.serving_digest, factors.digest())
    for store, checkpoint in zip(here, checkpoints, strict=True):
        _add(store, AdaptedSource(checkpoint, factors=factors), digest, origin)
    return digest


def _add(store: AdapterStore, source: AdaptedSource, digest: str, origin: Origin) -> None:
    """Builds in a hidden folder, which becomes the version when it is whole and on the disk."""
    try:
        with _staging(store) as staging:
            if _sound(store, digest):
                return
            version = staging / "version"
            version.mkdir()
            adapter = Adapter(
                digest=digest,
                serving_digest=store.folder.manifest.serving_digest,
                factors_digest=source.factors.digest(),
                files=_files(source, store.folder, version),
                origin=origin,
            )
            (version / ADAPTER).write_text(adapter.model_dump_json(indent=1))
            _sync(version)
            with suppress(FileNotFoundError):
                (store.path / digest).rename(staging / "damaged")
            durable.move(version, store.path / digest)
    except OSError as error:
        raise ConfigError(f"{store.path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def _staging(store: AdapterStore) -> Iterator[Path]:
    """A folder to build in, for one builder at a time; what killed ones have left is swept away."""
    with store.locked("building"):
        for left in store.path.glob(f"{_STAGING}*"):
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(prefix=_STAGING, dir=store.path) as staging:
            yield Path(staging)


def _sound(store: AdapterStore, digest: str) -> bool:
    try:
        store.verify(digest)
    except (DamagedFile, DigestMismatch):
        return False
    return True


def _sync(folder: Path) -> None:
    """Returns when the folder and its files are on the disk."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _files(source: AdaptedSource, folder: TierFolder, out: Path) -> dict[str, FileEntry]:
    """The shard's files in `out`, less those that are the same in `folder`."""
    serving = folder.manifest.serving
    with closing(WeightsFile(out / WEIGHTS)) as weights:
        model = build(source, folder.tier, serving.cuts, serving.quantization, weights)
    (out / MODEL).write_bytes(model)
    written = {
        MODEL: FileEntry(size=len(model), sha256=hashlib.sha256(model).hexdigest()),
        WEIGHTS: weights.entry(),
    }
    for name, entry in written.items():
        if entry == folder.files[name]:
            (out / name).unlink()
    return {name: entry for name, entry in written.items() if entry != folder.files[name]}


def _slice(folder: TierFolder) -> Checkpoint:
    """The float slice of a tier, as a checkpoint that holds this tier's tensors only."""
    listed = folder.manifest.training.get(folder.tier, {})
    if FLOATS not in listed:
        what = f"{folder.path}: the bundle was split without the float weights that adapters are built from"
        raise ConfigError(f"{what}; split again with --train")
    config = Fields(json.loads(folder.read(CONFIG)), str(folder.path / CONFIG))
    file = SafetensorsFile(folder.path / FLOATS)
    # Not by folder.read(): a slice may be larger than memory.
    with file.path.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != listed[FLOATS].sha256:
        raise DamagedFile(f"{file.path}: the contents are not those of the manifest; {REMEDY}")
    return Checkpoint(folder.path, config, dict.fromkeys(file.entries, file))


def _check(factors: LoraFactors, names: Names, folder: TierFolder) -> None:
    serving = folder.manifest.serving
    shapes = tensor_shapes(names)
    core = tuple(
        names.layer(layer).input_norm.removesuffix("input_layernorm.weight")
        for layer in serving.cuts.layers("cloud", len(serving.spec.layers))
    )
    for weight, shape in factors.shapes().items():
        projection = weight.removesuffix(".weight")
        if weight not in shapes:
            raise InvalidRequest(f"the factors name {projection}, which this model does not have")
        if weight.startswith(core):
            raise InvalidRequest(f"the factors name {projection}: it is in the core, which stays as it is")
        if shape != shapes[weight]:
            found, wanted = list(shape), list(shapes[weight])
            raise InvalidRequest(f"the factors of {projection} are of a weight {found}, it is {wanted}")
