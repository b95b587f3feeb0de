"""A federation as it is deployed: SuperLink, SuperNodes, training process, trainers, each a process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.training_process import TrainingProcess
from trifold.cloud.federation.checkpoint import Checkpoint
from trifold.cloud.federation.metrics import read
from trifold.cloud.split.split import split
from trifold.shared.bundle.factors import LoraFactors
from trifold.shared.bundle.manifest import Cuts
from trifold.shared.model.checkpoint import Checkpoint as Model

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
TRIFOLD = (sys.executable, "-m", "trifold.shared.cli.main")
TEXTS = {"code": ROOT / "shared", "prose": ROOT / "docs"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Federation:
    """Processes of one federation on loopback; what they print lies in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.superlink = f"127.0.0.1:{free_port()}"
        self._stack = ExitStack()
        self._environment = os.environ | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        log = self._stack.enter_context((self.folder / f"{name}.log").open("wb"))
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=ROOT, env=self._environment, start_new_session=True
        )
        self._stack.callback(self._stop, process)
        return process

    def start_link(self) -> None:
        """The SuperLink, and what starts its ServerApps."""
        host, port = self.superlink.split(":")
        database = str(self.folder / "flwr.sqlite")
        link = [
            "--insecure",
            "--host",
            host,
            "--port",
            port,
            "--database",
            database,
            "--isolation",
            "process",
        ]
        self.start("superlink", "flower-superlink", *link, "--disable-runtime-dependency-installation")
        self.start("superexec", "flower-superexec", "--insecure", "--runtime-api-address", self.superlink)

    def start_site(self, name: str, bundle: Path, cloud: str) -> None:
        """The site's trainer and its node."""
        state = self.folder / name
        told = ["--text", str(TEXTS[name]), "--site", name, "--cloud", cloud, "--threads", "1"]
        self.start(f"{name}-trainer", *TRIFOLD, "edge", "train", str(bundle), *told, "--state", str(state))
        node = [self.superlink, "--trainer", str(state / "trainer.sock"), "--port", str(free_port())]
        self.start(f"{name}-node", *TRIFOLD, "edge", "join", *node, "--insecure")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`trifold federate ARGUMENTS`, to its end."""
        return subprocess.run(
            [*TRIFOLD, "federate", *arguments, "--superlink", self.superlink],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=ROOT,
            env=self._environment,
            check=False,
        )

    def close(self) -> None:
        self._stack.close()

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        """With all that it has started: a session of its own."""
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    running = Federation(tmp_path)
    yield running
    running.close()


def test_two_sites_train_an_adapter_through_flower(federation: Federation, tmp_path: Path) -> None:
    bundle, folder = tmp_path / "bundle", tmp_path / "run"
    split(Model.open(ROOT / "models" / "trifold-nano"), Cuts(edge=1, cloud=6), bundle, train=True)
    with TrainingProcess(bundle) as training:
        federation.start_link()
        for site in TEXTS:
            federation.start_site(site, bundle, training.address)
        small = [
            "rounds=2",
            "quorum=2",
            "local.steps=2",
            "local.sequences=2",
            "local.length=32",
            "local.evaluate=1",
        ]
        done = federation.run("run", str(folder), *(word for item in small for word in ("--set", item)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 rounds done" in done.stdout
    factors = LoraFactors.load(folder / "adapter.safetensors")
    assert any(array.any() for name, array in factors.tensors.items() if name.endswith("lora_B"))
    last = Checkpoint.last(folder / "checkpoints")
    assert last is not None
    assert last.taken == {"code": 2, "prose": 2}
    for row in last.history:
        for report in row["sites"].values():
            assert report["update_up"] <= 0.27 * report["update_down"]
    assert [event["event"] for event in read(folder)][-2:] == ["evaluation", "end"]
