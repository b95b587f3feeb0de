"""The graph that TensorRT is given, by its numbers: run by ONNX Runtime, beside the float model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx.external_data_helper import load_external_data_for_model
from onnx.reference import ReferenceEvaluator

from tests.cloud.parities import FEATURES
from tests.cloud.tensorrt_graphs import (
    CASES,
    CUTS,
    CoreGraph,
    by_the_float_model,
    core_graph,
    error,
    some_rows,
)
from tests.shared.sites import train_bundle
from trifold.cloud.core.engines.tensorrt.precision import Precision
from trifold.shared.bundle.manifest import Cuts
from trifold.shared.runtime.shard import Rows

LENGTHS = (40, 23, 9)
SLOTS = 64


def by_the_graph(graph: CoreGraph, sessions: list[Rows], decoded: int) -> list[Rows]:
    """A prompt of each session by itself, then single rows of all of them together, as the engine does it."""
    starts = [len(rows) - decoded for rows in sessions]
    out = [
        [graph.run(rows[None, :start], np.arange(start)[None], slice(place, place + 1))[0]]
        for place, (rows, start) in enumerate(zip(sessions, starts, strict=True))
    ]
    for step in range(decoded):
        at = np.array(starts)[:, None] + step
        together = np.stack([rows[place] for rows, place in zip(sessions, at, strict=True)])
        for parts, row in zip(out, graph.run(together, at), strict=True):
            parts.append(row)
    return [np.concatenate(parts) for parts in out]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_rows_are_those_of_the_float_model_in_prompts_and_in_batches(
    family: str, name: str, tmp_path: Path
) -> None:
    _, bundle = train_bundle(family, tmp_path, cuts=CUTS, **FEATURES[family][name])
    sessions = [some_rows(length, seed) for seed, length in enumerate(LENGTHS)]
    model = core_graph(bundle, tmp_path, SLOTS)
    graph = CoreGraph.on_onnxruntime(model, tmp_path, len(sessions))
    found = error(by_the_graph(graph, sessions, decoded=8), by_the_float_model(bundle, sessions))
    print(f"{family} {name}: relative error {found:.1e}")
    assert found < 1e-4


def test_a_session_that_sits_out_a_batch_and_one_that_was_cut_back_lose_nothing(tmp_path: Path) -> None:
    _, bundle = train_bundle("qwen3_moe", tmp_path, cuts=CUTS)
    rows, other = some_rows(30, 0), some_rows(30, 1)
    graph = CoreGraph.on_onnxruntime(core_graph(bundle, tmp_path, SLOTS), tmp_path, 2)
    graph.run(rows[None, :20], np.arange(20)[None], slice(0, 1))
    # Blank rows of the first, where its next ones will stand, while the second decodes; then drafts.
    for at in range(5):
        graph.run(np.stack([np.zeros_like(rows[:1]), other[at : at + 1]]), np.array([[20], [at]]))
    graph.run(other[None, 5:9], np.arange(20, 24)[None], slice(0, 1))
    out = graph.run(rows[None, 20:], np.arange(20, 30)[None], slice(0, 1))[0]
    assert error([out], [by_the_float_model(bundle, [rows])[0][20:]]) < 1e-4


@pytest.mark.parametrize(("precision", "most"), [("bf16", 0.015), ("fp16", 0.002), ("fp8", 0.12)])
@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])
def test_low_precisions_stay_as_close_as_their_digits_allow(
    family: str, precision: Precision, most: float, tmp_path: Path
) -> None:
    _, bundle = train_bundle(family, tmp_path, cuts=Cuts(edge=0, cloud=1))
    sessions = [some_rows(12, 0)]
    model = core_graph(bundle, tmp_path, 16, precision)
    load_external_data_for_model(model, str(tmp_path))
    graph = CoreGraph(model, ReferenceEvaluator(model).run, 1, precision)
    [out], [wanted] = by_the_graph(graph, sessions, decoded=2), by_the_float_model(bundle, sessions)
    found = float(np.linalg.norm(out[1:] - wanted[1:]) / np.linalg.norm(wanted[1:]))
    print(f"{family} {precision}: relative error {found:.1e}")
    assert 1e-4 < found < most
