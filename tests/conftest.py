"""Bundles that tests share: split once a session, from a small random DeepSeek-V3 of four layers."""

from __future__ import annotations

import fcntl
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import SMALL, generate
from trifold.cloud.split.split import split
from trifold.shared.bundle.manifest import Cuts
from trifold.shared.model.checkpoint import Checkpoint


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """In the background SIGINT is ignored, here and in whatever is started from here."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def default_ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The ports that services take unless told otherwise: one test at a time has them, of all workers."""
    with (tmp_path_factory.getbasetemp().parent / "default-ports").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that the bundles are made of."""
    config = {
        **SMALL["deepseek_v3"],
        "model_type": "deepseek_v3",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "norm_topk_prob": True,
        "hidden_act": "silu",
    }
    return generate(config, tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose device has norm and head alone, and gets only the rows that it needs."""
    return _split(checkpoint, Cuts(edge=1, cloud=4), tmp_path_factory.mktemp("bundle") / "head")


@pytest.fixture(scope="session")
def attending_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose device has an attention layer, and gets every row."""
    return _split(checkpoint, Cuts(edge=1, cloud=3), tmp_path_factory.mktemp("bundle") / "attending")


def _split(checkpoint: Path, cuts: Cuts, out: Path) -> Path:
    split(Checkpoint.open(checkpoint), cuts, out)
    return out
