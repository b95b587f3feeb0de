"""A run on its way to Flower: `flwr run`, with a connection of its own and nobody's configuration."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trifold.cloud.federation.folder import RunFolder
from trifold.shared.errors import ConfigError, Unavailable

_FLWR: Final = Path(sys.executable).with_name("flwr")

_TIMEOUT: Final = 60.0
"""Seconds that `flwr run` may take."""

_PATIENCE: Final = 30.0
"""Seconds that a SuperLink has to come up."""


@dataclass(frozen=True)
class SuperLink:
    """Where Flower's control interface is; without `root_certificates` on loopback only, and without TLS."""

    address: str
    root_certificates: Path | None = None

    def wait(self) -> None:
        """Until somebody listens there. Raises Unavailable after a while."""
        host, _, port = self.address.rpartition(":")
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
                return
            except ValueError:
                raise ConfigError(f"{self.address!r} is not HOST:PORT") from None
            except OSError as error:
                if time.monotonic() >= until:
                    raise Unavailable(f"no SuperLink at {self.address}: {error.strerror or error}") from None
            time.sleep(0.2)

    def connection(self) -> str:
        """As Flower's config.toml has it."""
        safety = "insecure = true"
        if self.root_certificates:
            safety = f"root-certificates = {json.dumps(str(self.root_certificates.absolute()))}"
        name = "trifold"
        lines = ["[superlink]", f'default = "{name}"', f"[superlink.{name}]"]
        return "\n".join([*lines, f"address = {json.dumps(self.address)}", safety, ""])


@dataclass(frozen=True)
class Simulation:
    """Nodes of Flower's simulation engine, which all share the trainer at a Unix socket."""

    nodes: int
    trainer: Path


def check(app: Path) -> None:
    """Raises ConfigError when `app` is not the Flower app, or Flower is not installed."""
    if not (app / "pyproject.toml").exists():
        raise ConfigError(f"{app} is not the Flower app: give --app deploy/flower of Trifold's repository")
    if not _FLWR.exists():
        raise ConfigError("flwr is not installed: install Trifold with the extra 'federated'")


def submit(folder: RunFolder, superlink: SuperLink, app: Path, simulation: Simulation | None = None) -> int:
    """Start a run at the SuperLink; returns Flower's number of it.

    Raises Unavailable with Flower's words when it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="trifold-flwr-") as home:
        (Path(home) / "config.toml").write_text(superlink.connection(), encoding="utf-8")
        command = [str(_FLWR), "run", str(app), "--format", "json"]
        command += ["--run-config", f"folder={json.dumps(str(folder.path))}"]
        if simulation:
            command += ["--run-config", f"trainer={json.dumps(str(simulation.trainer.absolute()))}"]
            command += ["--federation-config", f"num-supernodes={simulation.nodes}"]
        quiet = {"FLWR_HOME": home, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT, env=os.environ | quiet, check=False
            )
        except subprocess.TimeoutExpired:
            raise Unavailable(f"the SuperLink at {superlink.address} did not answer") from None
    try:
        return int(json.loads(done.stdout[done.stdout.index("{") :])["run-id"])
    except (ValueError, KeyError, TypeError):
        said = (done.stdout + done.stderr).strip() or f"exit code {done.returncode}"
        raise Unavailable(
            f"the SuperLink at {superlink.address} did not start the run: {said[-600:]}"
        ) from None
