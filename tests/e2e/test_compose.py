"""What deploy/compose.yaml starts, without containers: the same scripts and commands as plain processes.

Folders of volumes lie in one folder, names of services become localhost, and ports free ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest

from tests.e2e.test_deploy_page import free_ports
from tests.test_deploy import DEPLOY, compose, output
from tests.test_readme import ROOT

PORTS: Final = ("50060", "50061", "50063", "50070", "50071", "8443")
PATIENCE: Final = 120.0


class Containers:
    """The services of the compose file, as a context."""

    def __init__(self, services: dict[str, Any], folder: Path) -> None:
        self.state = folder / "state"
        self._services = services
        self._scripts = folder / "scripts"
        self._ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
        self._running = ExitStack()
        self._scripts.mkdir()
        for name in services:
            (self.state / name).mkdir(parents=True)
        for script in ("prepare.sh", "enter.sh", "health.py"):
            text = (DEPLOY / "docker" / script).read_text(encoding="utf-8")
            text = text.replace("--host authority", "--host localhost")
            text = text.replace("/model", str(ROOT / "models" / "trifold-nano"))
            (self._scripts / script).write_text(self._here(text))

    def prepare(self, hindrance: str = ":") -> subprocess.CompletedProcess[str]:
        """Runs the service that runs once, in a shell in which a line was typed before."""
        (script,) = self._services["prepare"]["entrypoint"]
        command = ["sh", "-c", f"{hindrance}; exec sh {self._here(script)}"]
        return subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)

    def start(self, name: str) -> None:
        """Starts a service and waits until it is healthy, by what its container is asked."""
        service = self._services[name]
        command = ["sh", str(self._scripts / "enter.sh"), *map(self._here, service["command"])]
        process = subprocess.Popen(
            command,
            cwd=self.state / name,
            env=self._environment | {k: self._here(v) for k, v in service["environment"].items()},
        )
        self._running.callback(process.wait)
        self._running.callback(process.terminate)
        _, *question = map(self._here, service["healthcheck"]["test"])
        question[0] = sys.executable
        deadline = time.monotonic() + PATIENCE
        while subprocess.run(question, cwd=self.state / name, capture_output=True, check=False).returncode:
            assert process.poll() is None, f"{name} ended"
            assert time.monotonic() < deadline, f"{name} is not healthy"

    def url(self) -> str:
        """Where the site answers over HTTPS."""
        published = {str(port["target"]) for port in self._services["device"]["ports"]}
        assert published == {"8443", "50063"}
        return f"https://localhost:{self._ports['8443']}/v1/completions"

    def __enter__(self) -> Containers:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    @property
    def _environment(self) -> dict[str, str]:
        return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def _here(self, text: str) -> str:
        text = text.replace("/var/lib/trifold", str(self.state)).replace("/opt/trifold", str(self._scripts))
        text = text.replace("0.0.0.0", "127.0.0.1")
        text = re.sub(rf"\b({'|'.join(self._services)}):(?=\d)", "localhost:", text)
        for port, free in self._ports.items():
            text = re.sub(rf"\b{port}\b", free, text)
        return text


@pytest.fixture
def containers(tmp_path: Path) -> Iterator[Containers]:
    plan = output(*compose(), "--file", str(DEPLOY / "compose.yaml"), "config", "--format", "json")
    with Containers(json.loads(plan)["services"], tmp_path) as found:
        yield found


def test_what_compose_starts_gives_tokens_over_tls(containers: Containers) -> None:
    prepared = containers.prepare()
    assert prepared.returncode == 0, prepared.stderr
    for name in ("authority", "core", "edge", "device"):
        containers.start(name)
    nodes = ("core", "edge", "device")
    assert not any((containers.state / name / "token").exists() for name in nodes)

    device = containers.state / "device"
    key = output(
        sys.executable,
        "-m",
        "trifold.shared.cli.main",
        "device",
        "key",
        "alice",
        "--keys",
        device / "keys.toml",
    )
    # Not sampled: an answer that chance ends would have fewer tokens.
    greedy = {"model": "trifold", "prompt": "import os\n", "max_tokens": 8, "temperature": 0}
    asked = json.dumps(greedy).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key.strip()}"}
    trusted = ssl.create_default_context(cafile=device / "node" / "authority.pem")
    request = urllib.request.Request(containers.url(), asked, headers)
    with urllib.request.urlopen(request, context=trusted, timeout=PATIENCE) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 8

    certificate = containers.state / "edge" / "node" / "chain.pem"
    two_days_ago = time.time() - 2 * 86_400
    os.utime(certificate, (two_days_ago, two_days_ago))
    assert containers.prepare().returncode == 0
    assert [name for name in nodes if (containers.state / name / "token").exists()] == ["edge"]


def test_a_first_run_that_failed_is_mended_by_the_next(containers: Containers) -> None:
    assert "trifold: not found" in containers.prepare("PATH=/usr/bin:/bin").stderr
    mended = containers.prepare()
    assert mended.returncode == 0, mended.stderr
    containers.start("authority")
    containers.start("core")


def test_a_part_of_the_model_that_was_cut_short_is_copied_again(containers: Containers) -> None:
    assert containers.prepare().returncode == 0
    part = containers.state / "core" / "bundle" / "cloud"
    shutil.rmtree(part)
    assert containers.prepare("ulimit -f 64").returncode, "it wrote files of more than 32 KiB"
    assert containers.prepare().returncode == 0
    whole = containers.state / "authority" / "bundle" / "cloud"
    assert [path.name for path in part.parent.iterdir()] == ["cloud"]
    assert {path.name: path.read_bytes() for path in part.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }
