from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import pytest

from tests.collector import Collector
from trifold.shared.errors import Overloaded
from trifold.shared.telemetry.otlp import OtlpRecorder


class Silent(Collector):
    """Takes spans and never answers; `left` has the seconds a caller would still have waited when it left."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[float] = []

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - named by the protocol
        gone = threading.Event()
        context.add_callback(gone.set)
        gone.wait()
        self.left.append(context.time_remaining())
        return super().Export(request, context)


def test_a_collector_that_is_silent_does_not_hold_up_the_end_of_a_process() -> None:
    program = """
import sys
from trifold.shared.telemetry import traces
traces.export(sys.argv[1], "device")
with traces.span("generate"):
    pass
traces.flush()
"""
    with Silent() as collector:
        done = subprocess.run(
            [sys.executable, "-c", program, collector.url],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"OTEL_EXPORTER_OTLP_TIMEOUT": "20"},
        )
        assert (done.returncode, done.stderr) == (0, "")
        collector.wait_until(lambda spans: len(spans) == 1)
    (left,) = collector.left
    assert left > 0


def test_a_span_that_fails_has_the_reason_and_no_message() -> None:
    with Collector() as collector:
        recorder = OtlpRecorder(collector.url, "edge")
        for error in (Overloaded("who has come"), ValueError("what was said"), None):
            recorder.span("session", "").end(error)
        recorder.flush()
        collector.wait_until(lambda spans: len(spans) == 3)
    assert [span.error for span in collector.spans] == ["OVERLOADED", "INTERNAL", ""]
    assert not any(b"who has come" in sent or b"what was said" in sent for sent in collector.sent)


def test_where_the_environment_disables_the_sdk_nothing_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    span = OtlpRecorder("http://127.0.0.1:9", "edge").span("session", "")
    assert span.metadata == ()
    span.step("token", 0, 1, positions=1)
    span.end()
