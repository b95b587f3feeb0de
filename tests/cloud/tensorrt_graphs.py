"""The graph that TensorRT gets, run elsewhere, over caches for a batch of sessions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from tests.cloud.parities import FEATURES
from tests.shared.sites import shard
from trifold.cloud.core.engines.tensorrt.floats import float_source
from trifold.cloud.core.engines.tensorrt.graph import build
from trifold.cloud.core.engines.tensorrt.precision import COMPUTED, NUMPY, Precision
from trifold.cloud.core.engines.tensorrt.typed_weights import TypedWeights
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import Cuts
from trifold.shared.runtime.engine import WEIGHTS, load
from trifold.shared.runtime.shard import Rows

CASES: Final = [(family, name) for family in FEATURES for name in FEATURES[family] if name != "fp8"]
"""Families and features."""

CUTS: Final = Cuts(edge=0, cloud=4)
"""All four layers in the core."""

Run = Callable[[Any, dict[str, Any]], Any]
"""What ONNX Runtime's session and onnx's own reference are called with: names of outputs, inputs."""


def core_graph(bundle: Path, work: Path, slots: int, precision: Precision = "fp32") -> onnx.ModelProto:
    """The graph of a bundle's core; its weights lie beside it in the folder `work`."""
    folder = TierFolder.open(bundle, "cloud")
    serving = folder.manifest.serving
    layers = serving.cuts.layers("cloud", len(serving.spec.layers))
    with float_source(folder) as source, closing(TypedWeights(work / WEIGHTS)) as weights:
        return onnx.ModelProto.FromString(build(source, layers, slots, precision, weights))


def typed(model: onnx.ModelProto) -> onnx.ModelProto:
    """With the type of every value, all of which must follow."""
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


class CoreGraph:
    """A graph with caches for so many sessions."""

    def __init__(
        self, model: onnx.ModelProto, run: Run, sessions: int, precision: Precision = "fp32"
    ) -> None:
        self._run = run
        self._outputs = [value.name for value in model.graph.output]
        self.caches: dict[str, NDArray[Any]] = {}
        for value in model.graph.input:
            if value.name.startswith("past_"):
                sizes = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
                self.caches[value.name] = np.zeros([sessions, *sizes[1:]], NUMPY[COMPUTED[precision]])

    @classmethod
    def on_onnxruntime(cls, model: onnx.ModelProto, work: Path, sessions: int) -> CoreGraph:
        session = load(model.SerializeToString(), (work / WEIGHTS).read_bytes(), threads=1)
        return cls(model, session.run, sessions)

    def run(self, rows: Rows, positions: NDArray[np.int64], slots: slice = slice(None)) -> Rows:
        """rows (sessions, rows, hidden) at positions (sessions, rows), of the sessions in `slots`."""
        caches = {name: cache[slots] for name, cache in self.caches.items()}
        inputs: dict[str, NDArray[Any]] = {"rows": rows, "positions": positions, "write_at": positions[:, 0]}
        found = dict(zip(self._outputs, self._run(self._outputs, inputs | caches), strict=True))
        out: Rows = found.pop("rows_out")
        for name, present in found.items():
            self.caches[name.replace("present", "past")][slots] = present
        return out


def some_rows(length: int, seed: int) -> Rows:
    """As they come from an edge, the first far larger than the others."""
    rows = np.random.default_rng(seed).standard_normal((length, 64), np.float32)
    rows[0] *= 100
    return rows


def by_the_float_model(bundle: Path, sessions: list[Rows]) -> list[Rows]:
    core = shard(bundle, "cloud")
    with torch.no_grad():
        return [core(torch.from_numpy(rows)[None])[0].numpy() for rows in sessions]


def error(found: list[Rows], wanted: list[Rows]) -> float:
    """The largest difference in a row, over the row's largest value."""
    return max(
        float((np.abs(one - other).max(axis=1) / np.abs(other).max(axis=1)).max())
        for one, other in zip(found, wanted, strict=True)
    )
