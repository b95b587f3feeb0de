"""A real Prometheus for tests: the machine's own, or Debian's package, unpacked into build/."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from functools import cache
from http.client import HTTPConnection
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlencode

import pytest

from tests.debian import NotDebian, host, unpack

ROOT: Final = Path(__file__).parent.parent
RULES: Final = ROOT / "deploy" / "prometheus"

_CACHE: Final = ROOT / "build" / "prometheus"
_PATIENCE: Final = 60.0


@cache
def tool(name: str) -> Path:
    """`prometheus` or `promtool`. Skips the test where there is none and none can be had."""
    if installed := shutil.which(name):
        return Path(installed)
    unpacked = _CACHE / "usr" / "bin" / name
    if not unpacked.exists():
        _unpack()
    return unpacked


def _unpack() -> None:
    try:
        unpack("bookworm", host(), ["prometheus"], _CACHE, dependencies=False)
    except (NotDebian, subprocess.CalledProcessError) as error:
        told = getattr(error, "stderr", None) or error
        pytest.skip(f"no Prometheus here, and Debian's package `prometheus` cannot be had: {told}")


class Prometheus:
    """A server with the rules of deploy/ that scrapes `jobs` every two seconds, as a context.

    `jobs` has the addresses of each job.
    """

    def __init__(self, folder: Path, jobs: Mapping[str, Iterable[str]]) -> None:
        self._folder = folder
        scrapes = [
            {"job_name": job, "static_configs": [{"targets": [*addresses]}]}
            for job, addresses in jobs.items()
        ]
        every = {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "2s"}
        config = {"global": every, "rule_files": [str(RULES / "alerts.yml")], "scrape_configs": scrapes}
        (folder / "prometheus.yml").write_text(json.dumps(config))  # which is YAML, too
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [
                tool("prometheus"),
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                "--web.listen-address=127.0.0.1:0",
            ],
            stdout=self._log,
            stderr=self._log,
        )

    @property
    def _port(self) -> int:
        """Raises OSError until it listens."""
        listening = re.search(r'"Listening on" address=\S+:(\d+)', (self._folder / "log").read_text())
        if listening is None:
            raise OSError("Prometheus is not ready")
        return int(listening[1])

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The vector that an expression gives now, or one of its scalar."""
        data = self._get(f"/api/v1/query?{urlencode({'query': expression})}")
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        result: list[dict[str, Any]] = data["result"]
        return result

    def rules(self) -> list[dict[str, Any]]:
        """The alerts, with how their evaluation went."""
        return [rule for group in self._get("/api/v1/rules")["groups"] for rule in group["rules"]]

    def wait_until(self, expression: str) -> None:
        """Until it gives something; at most a minute."""
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                if self.query(expression):
                    return
            except OSError:
                assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < until, f"{expression} gives nothing"
            time.sleep(0.1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log.close()

    def _get(self, path: str) -> dict[str, Any]:
        connection = HTTPConnection(f"127.0.0.1:{self._port}", timeout=10)
        try:
            connection.request("GET", path)
            answer = json.loads(connection.getresponse().read())
        except ValueError as error:
            raise OSError("Prometheus is not ready") from error
        finally:
            connection.close()
        assert answer["status"] == "success", f"{path}: {answer.get('error')}"
        data: dict[str, Any] = answer["data"]
        return data
