"""The self-test of a shard finds what makes a row depend on the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
import pytest

from tests.checkpoints import save_random
from trifold.cloud.split.graph.builder import MICROSOFT, Builder
from trifold.cloud.split.graph.matrix import experts_in, experts_out
from trifold.cloud.split.graph.router import route
from trifold.cloud.split.split import split
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import Cuts
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.model.names import MoeNames
from trifold.shared.model.spec import MoeFfn
from trifold.shared.runtime import shard as shard_module
from trifold.shared.runtime.selftest import ROWS, prove, some_rows
from trifold.shared.runtime.shard import Rows, Shard


def core(checkpoint: Path, out: Path) -> Shard:
    split(Checkpoint.open(checkpoint), Cuts(edge=0, cloud=2), out)
    return Shard.load(TierFolder.open(out, "cloud"), threads=2)


def all_experts_of_a_row_at_once(
    builder: Builder, x: ir.Value, hidden: int, spec: MoeFfn, names: MoeNames
) -> ir.Value:
    """QMoE as it is meant to be used: it chooses and combines top_k experts itself."""
    experts, weights = route(builder, x, spec, names)
    chosen = builder.reshape(experts, -1, spec.top_k)
    hot = builder.op("OneHot", chosen, builder.ints(spec.experts), builder.floats(0, 1), axis=-1)
    scores = builder.reshape(builder.op("MatMul", weights, hot), -1, spec.experts)
    codes_in, scales_in = builder.quantized(
        experts_in(builder.source, names, spec.experts, spec.width, hidden), 8, spec.experts, 2 * spec.width
    )
    codes_out, scales_out = builder.quantized(
        experts_out(builder.source, names, spec.experts, spec.width, hidden), 8, spec.experts, hidden
    )
    return builder.op(
        "QMoE",
        x,
        scores,
        *(codes_in, scales_in, None, codes_out, scales_out),
        *([None] * 7),
        scores,
        domain=MICROSOFT,
        k=spec.top_k,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=0,
        expert_weight_bits=8,
        block_size=32,
        quant_type="int",
        accuracy_level=4,
        weights_prepacked=0,
    )


def test_experts_combined_by_the_operator_are_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save_random("mixtral", tmp_path / "model", num_hidden_layers=2, num_experts_per_tok=6)
    sound = core(checkpoint, tmp_path / "sound")
    monkeypatch.setattr("trifold.cloud.split.graph.shard.mixture", all_experts_of_a_row_at_once)
    careless = core(checkpoint, tmp_path / "careless")
    assert sound.exact
    assert not careless.exact


def test_wide_heads_with_few_keys_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save_random("llama", tmp_path / "model", num_hidden_layers=2, head_dim=192)
    assert core(checkpoint, tmp_path / "sound").exact
    monkeypatch.setattr(shard_module, "WIDE_HEAD", 1000)
    assert not core(checkpoint, tmp_path / "careless").exact


def test_attention_without_a_copy_of_the_last_row_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save_random("qwen3", tmp_path / "model", num_hidden_layers=2)
    monkeypatch.setattr(shard_module, "COPIES", 0)
    assert not core(checkpoint, tmp_path / "careless").exact


@pytest.mark.parametrize("positions", [1, 2, 129, 130, 139, 140, 1000])
def test_a_model_of_few_positions_is_tested_as_far_as_they_go(positions: int) -> None:
    def run(parts: Sequence[tuple[object, Rows, int]]) -> list[Rows]:
        assert parts
        return [rows for _, rows, _ in parts]

    rows = some_rows(8, positions)
    assert len(rows) == min(ROWS, positions)
    assert prove(rows, lambda capacity: None, run).exact


@pytest.mark.parametrize("size", [8, 64, 100])
def test_rows_that_another_size_of_batch_changes_are_found_out(size: int) -> None:
    def run(parts: Sequence[tuple[object, Rows, int]]) -> list[Rows]:
        last = size - 1 if len(parts) == size else None
        return [rows + (number == last) for number, (_, rows, _) in enumerate(parts)]

    rows = some_rows(8, ROWS)
    assert prove(rows, lambda capacity: None, run).exact
    assert not prove(rows, lambda capacity: None, run, together=100).exact


def test_the_fingerprint_says_what_computes_and_what_came_out(tmp_path: Path) -> None:
    first, second = (
        core(
            save_random("llama", tmp_path / f"model {seed}", num_hidden_layers=2, seed=seed),
            tmp_path / f"{seed}",
        )
        for seed in (1, 2)
    )
    assert first.fingerprint.startswith("onnxruntime-1.")
    assert "CPUExecutionProvider" in first.fingerprint
    again = Shard.load(TierFolder.open(tmp_path / "1", "cloud"), threads=1)
    assert again.fingerprint == first.fingerprint
    assert second.fingerprint != first.fingerprint
