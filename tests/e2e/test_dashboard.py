"""Dashboard and alerts against a real Prometheus that has scraped real tiers, with TLS, and training."""

from __future__ import annotations

import json
import math
import re
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import openai
import pytest
from openai import DefaultHttpxClient, OpenAI

from tests.identities import HOST, enrolled
from tests.processes import Processes
from tests.prometheus import ROOT, RULES, Prometheus, tool
from tests.shared.sites import train_bundle
from tests.site import Service
from tests.training_process import TrainingProcess
from trifold.cloud.authority.authority import Authority
from trifold.edge.federation.core import RemoteCore
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.telemetry.metrics import described

_PATIENCE: Final = 60.0

METRICS: Final = ["--metrics", "127.0.0.1:0"]
DASHBOARD: Final[dict[str, Any]] = json.loads((ROOT / "deploy" / "grafana" / "trifold.json").read_text())
ALERTS: Final = dict(re.findall(r"- alert: (\w+)\n +expr: (.+)", (RULES / "alerts.yml").read_text()))


@dataclass
class Site:
    """Everything that runs, and a client of it."""

    jobs: dict[str, list[str]]
    client: OpenAI
    core: RemoteCore

    def use(self) -> None:
        """Answers, a refusal, and batches that are trained."""
        for seed in range(3):
            self.client.completions.create(model="trifold", prompt="one two", max_tokens=12, seed=seed)
        with pytest.raises(openai.BadRequestError):
            self.client.completions.create(model="trifold", prompt="one two", max_tokens=10**6)
        rows = np.zeros((2, 16, 64), np.float32)
        for _ in range(3):
            batch, _ = self.core.forward(rows, keep=True)
            self.core.backward(batch, rows)


@pytest.fixture(scope="module")
def site(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    trained = train_bundle("deepseek_v3", folder / "train")[1]
    authority = Authority.init(folder / "authority", [HOST])
    cloud, edge, gateway = (enrolled(authority, folder / role, role) for role in ("core", "edge", "gateway"))
    with ExitStack() as running:
        tiers = running.enter_context(Processes(bundle, *METRICS, tls={"cloud": cloud, "edge": edge}))
        service = running.enter_context(Service(tiers, folder / "journals", "--tls", str(gateway), *METRICS))
        training = running.enter_context(TrainingProcess(trained, *METRICS))
        core = running.enter_context(
            RemoteCore(training.address, TierFolder.open(trained, "edge").manifest, "int8")
        )
        trusted = DefaultHttpxClient(verify=ssl.create_default_context(cafile=gateway / "authority.pem"))
        client = OpenAI(base_url=service.url, api_key="none", max_retries=0, http_client=trusted)
        logs = {
            "trifold-cloud": tiers.log("cloud"),
            "trifold-edge": tiers.log("edge"),
            "trifold-device": service.log,
            "trifold-training": training.log,
        }
        yield Site({job: [metrics_of(log)] for job, log in logs.items()}, running.enter_context(client), core)


@pytest.fixture(scope="module")
def prometheus(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has seen all processes before and after they were used."""
    with Prometheus(tmp_path_factory.mktemp("prometheus"), site.jobs) as server:
        for job in site.jobs:
            server.wait_until(f'up{{job="{job}"}} == 1')
        site.use()
        server.wait_until("increase(trifold_generation_tokens_total[30s]) > 0")
        server.wait_until('increase(trifold_compute_time_seconds_count{kind="batch"}[30s]) > 0')
        yield server


def metrics_of(log: str) -> str:
    """HOST:PORT of a process that shows metrics."""
    shown = re.search(r"metrics are at http://(\S+)/metrics", log)
    assert shown, log
    return shown[1]


def dashboard_expressions() -> list[str]:
    """As Grafana would send them, for all processes."""
    return [
        target["expr"].replace("$__rate_interval", "30s").replace("$instance", ".*")
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    ]


def quantity(alert: str) -> str:
    """What an alert compares with its threshold; while all is well the whole gives nothing."""
    compared = re.fullmatch(r"(.*) [<>] [\d.* ]+", alert)
    assert compared, f"{alert} is not QUANTITY, operator, THRESHOLD"
    return compared[1]


def has_data(prometheus: Prometheus, expression: str) -> bool:
    return any(math.isfinite(float(series["value"][1])) for series in prometheus.query(expression))


def test_every_expression_of_the_dashboard_and_the_alerts_gives_data(
    site: Site, prometheus: Prometheus
) -> None:
    expressions = [*dashboard_expressions(), *map(quantity, ALERTS.values())]
    print(f"{len(expressions)} expressions")
    assert len(expressions) > 50
    until = time.monotonic() + _PATIENCE
    while expressions := [each for each in expressions if not has_data(prometheus, each)]:
        assert time.monotonic() < until, expressions
        # A rate is of what is counted while Prometheus looks on.
        site.use()
        time.sleep(0.5)


def test_an_expression_over_what_is_not_there_is_found_out(prometheus: Prometheus) -> None:
    assert not has_data(prometheus, "rate(trifold_no_such_metric_total[30s])")
    assert not has_data(prometheus, 'trifold_exact{job="trifold-nowhere"}')


def test_prometheus_evaluates_all_alerts_and_a_healthy_site_raises_none(prometheus: Prometheus) -> None:
    rules = prometheus.rules()
    assert [rule["name"] for rule in rules] == [*ALERTS]
    assert {rule["health"] for rule in rules} == {"ok"}
    assert not [rule["name"] for rule in rules if rule["state"] == "firing"]


def test_promtool_finds_the_files_in_order_and_each_alert_fires_when_it_should() -> None:
    for command in (
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "alerts.yml"],
        ["test", "rules", "alerts_test.yml"],
    ):
        done = subprocess.run([tool("promtool"), *command], cwd=RULES, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    tested = re.findall(r'alertname="(\w+)"', (RULES / "alerts_test.yml").read_text())
    assert tested == [*ALERTS]


def test_each_metric_is_looked_at_somewhere_and_nothing_is_looked_at_that_there_is_not() -> None:
    looked_at = " ".join([*dashboard_expressions(), *ALERTS.values()])
    top = (ROOT / "device" / "trifold" / "device" / "commands" / "top.py").read_text()
    declared = [metric.name for metric in described()]
    assert not [name for name in declared if name not in looked_at + top]
    names = re.findall(r"\btrifold_\w+", looked_at)
    assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in names} <= {*declared}


def test_the_jobs_of_the_dashboard_are_those_that_are_scraped() -> None:
    scraped = set(re.findall(r"job_name: (\S+)", (RULES / "prometheus.yml").read_text()))
    assert set(re.findall(r'job="([\w-]+)"', " ".join(dashboard_expressions()))) <= scraped


def test_panels_have_ids_and_places_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
