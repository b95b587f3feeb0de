"""`trifold doctor` on a core's machine: each engine computes, or it says why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import save_random
from tests.edge.examinations import found
from trifold.cloud.split.split import split
from trifold.edge.doctor import engines
from trifold.edge.doctor.engines import ENGINES
from trifold.edge.doctor.patient import Patient
from trifold.shared.bundle.manifest import Cuts
from trifold.shared.model.checkpoint import Checkpoint


def core_of(path: Path, *, train: bool) -> Path:
    """The cloud's part of a bundle, with float weights if it is for training, too."""
    checkpoint = save_random("qwen3_moe", path / "checkpoint")
    split(Checkpoint.open(checkpoint), Cuts(edge=1, cloud=3), path / "bundle", train=train)
    return path / "bundle" / "cloud"


def test_every_engine_that_is_here_computes(tmp_path: Path) -> None:
    onnxruntime, tensorrt, torch = found(ENGINES, Patient(bundle=core_of(tmp_path, train=True), threads=1))
    assert (onnxruntime.verdict, torch.verdict) == ("ok", "ok")
    assert onnxruntime.detail.startswith("onnxruntime: onnxruntime-")
    assert "0.0% off the shard's rows" in onnxruntime.detail
    assert torch.detail.startswith("torch: torch-")
    assert "0.0% off" not in torch.detail
    # Without a GPU there is nothing to build an engine for.
    assert tensorrt.verdict in ("skipped", "warning")


def test_an_engine_that_has_no_weights_here_is_skipped_and_says_what_it_lacks(tmp_path: Path) -> None:
    findings = found(ENGINES, Patient(bundle=core_of(tmp_path, train=False), threads=1))
    told = {finding.detail.partition(":")[0]: finding for finding in findings}
    assert sorted(told) == ["onnxruntime", "tensorrt", "torch"]
    assert told["onnxruntime"].verdict == "ok"
    assert told["torch"].verdict == "skipped"
    assert "trifold split --train" in told["torch"].detail


def test_settings_of_one_engine_are_not_held_against_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIFOLD_CLOUD_WEIGHTS", "fp32")
    (tmp_path / "trifold.toml").write_text('[cloud]\ndevice = "cuda:7"\n')
    patient = Patient(config=tmp_path / "trifold.toml", bundle=core_of(tmp_path, train=True), threads=1)
    onnxruntime, tensorrt, torch = found(ENGINES, patient)
    assert onnxruntime.verdict == "ok"
    assert "--weights" not in tensorrt.detail
    assert torch.verdict == "skipped"
    assert "cuda:7" in torch.detail


def test_an_engine_that_does_not_fit_the_memory_is_skipped(tmp_path: Path) -> None:
    core = core_of(tmp_path, train=True)
    sizes = [sum((core / name).stat().st_size for name in names) for names in _NEEDS]
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text(f"MemAvailable: {(sizes[0] + sizes[1]) // 2 // 1024} kB\n")
    onnxruntime, _, torch = found(ENGINES, Patient(bundle=core, threads=1, root=tmp_path))
    assert onnxruntime.verdict == "ok"
    assert torch.detail == "torch: the core does not fit the memory"


_NEEDS = ["model.onnx", "weights.bin", "config.json"], ["float.safetensors"]


def test_a_site_has_none(bundle: Path) -> None:
    for patient in (Patient(), Patient(bundle=bundle), Patient(bundle=bundle / "edge")):
        [finding] = found(ENGINES, patient)
        assert finding.verdict == "skipped"


@pytest.mark.parametrize(
    ("trial", "told"),
    [
        ("import os; os.abort()", "it ended the process that tried it (SIGABRT)"),
        ("raise SystemExit('out of memory')", "out of memory"),
        ("print('a banner')", "makes no sense: a banner"),
        ('print(\'{"fingerprint": "f", "exact": true, "error": NaN, "seconds": 1}\')', "wrong results"),
        ('print(\'{"fingerprint": "f", "exact": true, "error": 0.9, "seconds": 1}\')', "wrong results"),
        ('print(\'{"fingerprint": "f", "exact": false, "error": 0, "seconds": 1}\')', "NOT exact"),
    ],
)
def test_an_engine_that_fails_in_its_own_way_is_told(
    trial: str, told: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_trial.py").write_text(trial)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(engines, "_TRIAL", "failing_trial")
    for finding in found(ENGINES, Patient(bundle=bundle / "cloud")):
        assert finding.verdict == "warning"
        assert told in finding.detail
        own = finding.detail.startswith("onnxruntime:")
        assert ("install onnxruntime again" if own else "--engine onnxruntime") in finding.remedy
