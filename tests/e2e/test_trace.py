"""One trace of a request over device, edge and core, each a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.collector import Collector, Span
from tests.processes import Processes
from trifold.device import Client
from trifold.shared.errors import ERRORS, ConfigError
from trifold.shared.telemetry import traces

PROMPT = "one two three"
TOKENS = 6
STEPS = {"positions", "queue_ns", "compute_ns"}


@pytest.fixture(autouse=True)
def _sent_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not every five seconds."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")


def generate(
    tiers: Processes, url: str, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = ["generate", "--edge", tiers.edge, "--bundle", str(tiers.bundle), "--traces", url, *options]
    return subprocess.run(
        [sys.executable, "-m", "trifold.shared.cli.main", *command, "--prompt", PROMPT],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def sessions(spans: list[Span]) -> Counter[str]:
    return Counter(span.service for span in spans if span.name in ("generate", "session"))


def answered(spans: Sequence[Span]) -> set[str]:
    """What ended well, of device and edge."""
    return {span.name for span in spans if span.service != "trifold-cloud" and not span.error}


def test_a_request_has_one_trace_that_tells_when_and_how_much_and_nothing_else(
    bundle: Path, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    with Collector() as collector, Processes(bundle, "--traces", collector.url) as tiers:
        done = generate(tiers, collector.url, "--max-tokens", str(TOKENS), "--journal", str(journal))
        assert done.returncode == 0, done.stderr
        collector.wait_until(lambda spans: len(sessions([*spans])) == 3)
        spans, sent = collector.spans, b"".join(collector.sent)
    assert len({span.trace for span in spans}) == 1
    device, edge, core = (
        next(span for span in spans if span.service == f"trifold-{tier}" and span.name == name)
        for tier, name in (("device", "generate"), ("edge", "session"), ("cloud", "session"))
    )
    assert (device.parent, edge.parent, core.parent) == (b"", device.id, edge.id)
    assert device.began <= edge.began <= core.began < core.ended
    for whole in (device, edge, core):
        below = [span for span in spans if span.parent == whole.id and span.service == whole.service]
        assert [span.name for span in below].count("token") == TOKENS - 1
        assert [span.name for span in below].count("prompt") == 1
        for span in below:
            assert span.attributes.keys() == STEPS
            assert whole.began <= span.began <= span.ended <= whole.ended
            took = span.attributes["queue_ns"] + span.attributes["compute_ns"]
            assert 0 < took <= span.ended - span.began
    assert not any(span.attributes or span.events or span.error for span in (device, edge, core))
    request = json.loads(journal.read_text().splitlines()[0])
    secret = bytes.fromhex(request["session"])
    assert secret.hex().encode() not in sent
    assert secret not in sent
    assert PROMPT.encode() not in sent


def test_what_was_lost_and_resumed_is_in_the_same_trace(bundle: Path) -> None:
    with Collector() as collector, Processes(bundle, "--traces", collector.url) as tiers:
        before = traces._recorder
        traces.export(collector.url, "device")
        try:
            with (
                Client(tiers.edge, bundle=bundle) as client,
                client.generate(PROMPT, max_tokens=40) as tokens,
            ):
                next(tokens)
                tiers.kill("cloud")
                tiers.start("cloud")
                assert sum(len(chunk.token_ids) for chunk in tokens) == 39
            traces.flush()
            collector.wait_until(lambda spans: {"generate", "session"} <= answered(spans))
        finally:
            traces._recorder = before
        spans = collector.spans
    (device,) = (span for span in spans if span.name == "generate")
    assert device.events == ("resumed",)
    lost, *_, resumed = sorted(
        (span for span in spans if (span.service, span.name) == ("trifold-edge", "session")),
        key=lambda span: span.began,
    )
    assert (lost.parent, resumed.parent) == (device.id, device.id)
    assert (lost.error, resumed.error) == ("UNAVAILABLE", "")


def test_what_is_not_sampled_at_the_device_is_not_traced_in_any_tier(bundle: Path) -> None:
    never = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"}
    with Collector() as collector, Processes(bundle, "--traces", collector.url) as tiers:
        assert generate(tiers, collector.url, "--max-tokens", "2", **never).returncode == 0
        assert generate(tiers, collector.url, "--max-tokens", "3").returncode == 0
        collector.wait_until(lambda spans: len(sessions([*spans])) == 3)
        assert len({span.trace for span in collector.spans}) == 1


def test_a_traceparent_that_is_none_begins_a_trace_of_its_own(bundle: Path) -> None:
    with Collector() as collector, Processes(bundle, "--traces", collector.url) as tiers:
        with grpc.insecure_channel(tiers.edge) as channel:
            method: Any = channel.stream_stream("/trifold.proto.v1.EdgeService/Session")
            with pytest.raises(grpc.RpcError):
                next(method(iter([b"rubbish"]), metadata=[("traceparent", "00-rubbish")]))
        collector.wait_until(lambda spans: len(spans) == 1)
        (span,) = collector.spans
        assert (span.service, span.parent, span.error) == ("trifold-edge", b"", "INVALID_REQUEST")


def test_a_collector_that_is_away_costs_nobody_a_token(bundle: Path) -> None:
    with Processes(bundle) as tiers:
        done = generate(tiers, "http://127.0.0.1:9", "--max-tokens", "3")
    assert done.returncode == 0
    assert done.stdout


def test_without_the_extra_traces_are_refused_with_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "opentelemetry.py").write_text("raise ModuleNotFoundError('gone', name='opentelemetry')")
    command = [sys.executable, "-m", "trifold.shared.cli.main", "cloud", "serve", "bundle"]
    done = subprocess.run(
        [*command, "--traces", "http://127.0.0.1:4317"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == ERRORS["CONFIG"].exit_code
    assert "install Trifold with the extra 'telemetry'" in done.stderr


def test_traces_leave_this_machine_by_tls_only() -> None:
    with pytest.raises(ConfigError, match="by https"):
        traces.export("http://collector.example.org:4317", "edge")


def test_who_does_not_ask_for_traces_loads_nothing_of_opentelemetry() -> None:
    program = """
import sys
import trifold.cloud.core.command, trifold.edge.service.command, trifold.device.service.command
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    subprocess.run([sys.executable, "-c", program], check=True)
