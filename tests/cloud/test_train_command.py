from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.shared.sites import train_bundle
from tests.training_process import TrainingProcess
from trifold.cloud.train.command import train
from trifold.edge.federation.core import RemoteCore
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.errors import ConfigError


def test_a_bundle_without_float_weights_is_refused_with_what_to_do(bundle: Path) -> None:
    with pytest.raises(ConfigError, match="make it again with `trifold split --train`"):
        train(bundle, listen="127.0.0.1:0")


def test_without_torch_the_extra_that_brings_it_is_named(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match="needs the package torch: install Trifold with the extra 'train'"):
        train(bundle, listen="127.0.0.1:0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_does_not_find_is_told_with_what_to_do(bundle: Path) -> None:
    for device in ("cuda", "CUDA:1"):
        with pytest.raises(ConfigError, match=f"--device {device.lower()}: torch .* finds no CUDA here"):
            train(bundle, listen="127.0.0.1:0", device=device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_too_many_is_told_with_those_there_are(bundle: Path) -> None:
    with pytest.raises(ConfigError, match="--device cuda:99: this machine has cuda:0 to"):
        train(bundle, listen="127.0.0.1:0", device="cuda:99")


def test_a_device_or_dtype_that_torch_has_not_is_refused_with_those_it_has(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="--device is 'gpu': it must be cpu, cuda or cuda:N"):
        train(bundle, device="gpu")
    monkeypatch.setenv("TRIFOLD_TRAIN_DTYPE", "fp8")
    with pytest.raises(ConfigError, match="TRIFOLD_TRAIN_DTYPE is 'fp8': it must be 'fp32' or 'bf16'"):
        train(bundle)


def test_a_core_in_bfloat16_is_served_as_flag_or_file_say(tmp_path: Path) -> None:
    _, bundle = train_bundle("qwen3_moe", tmp_path)
    rows = np.random.default_rng(0).standard_normal((2, 16, 64), np.float32)
    answers = []
    for options in ((), ("--dtype", "bf16", "--row-memory", "1MiB")):
        with TrainingProcess(bundle, *options) as training:
            manifest = TierFolder.open(bundle, "edge").manifest
            with RemoteCore(training.address, manifest, "none") as core:
                batch, there = core.forward(rows, keep=True)
                answers.append((there, core.backward(batch, rows)))
    for exact, near in zip(*answers, strict=True):
        assert not np.array_equal(exact, near)
        cosine = (exact * near).sum() / np.linalg.norm(exact) / np.linalg.norm(near)
        assert cosine > 0.99


def test_serving_a_core_brings_no_torch() -> None:
    script = "import sys, trifold.cloud.core.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
