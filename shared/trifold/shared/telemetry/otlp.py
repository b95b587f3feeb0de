"""Spans by OpenTelemetry's SDK, sent with OTLP over gRPC. Needs the extra `telemetry`."""

from __future__ import annotations

import threading
from importlib.metadata import version
from time import perf_counter_ns, time_ns
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from trifold.shared.errors import TrifoldError
from trifold.shared.telemetry.traces import TRACEPARENT, Metadata, Span

_MOMENT: Final = 2.0
"""Seconds that a collector gets at the end of a process."""

_W3C: Final = TraceContextTextMapPropagator()


class OtlpRecorder:
    """Samples by the standard variables OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG; else keeps all."""

    def __init__(self, to: str, tier: str) -> None:
        about = {"service.name": f"trifold-{tier}", "service.version": version("trifold")}
        self._provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=to)))
        self._tracer = self._provider.get_tracer("trifold")

    def span(self, name: str, parent: str) -> Span:
        return OtlpSpan(self._tracer, name, parent)

    def flush(self) -> None:
        # The SDK heeds no time limit: a collector that is silent would hold this up for ten seconds.
        flushing = threading.Thread(target=self._provider.force_flush, name="traces", daemon=True)
        flushing.start()
        flushing.join(_MOMENT)


class OtlpSpan(Span):
    """A span of the SDK."""

    def __init__(self, tracer: Tracer, name: str, parent: str) -> None:
        above = _W3C.extract({TRACEPARENT: parent}, Context())
        kind = SpanKind.SERVER if parent else SpanKind.INTERNAL
        self._tracer = tracer
        self._span = tracer.start_span(name, above, kind)
        self._context = trace.set_span_in_context(self._span, Context())
        self._epoch_ns = time_ns() - perf_counter_ns()

    @property
    def metadata(self) -> Metadata:
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, self._context)
        # There is none where OTEL_SDK_DISABLED has it so.
        traceparent = carrier.get(TRACEPARENT)
        return ((TRACEPARENT, traceparent),) if traceparent else ()

    def step(self, name: str, began_ns: int, ended_ns: int, **numbers: int) -> None:
        if self._span.is_recording():
            step = self._tracer.start_span(
                name, self._context, attributes=numbers, start_time=self._epoch_ns + began_ns
            )
            step.end(self._epoch_ns + ended_ns)

    def event(self, name: str, reason: str) -> None:
        self._span.add_event(name, {"reason": reason})

    def end(self, error: BaseException | None = None) -> None:
        if isinstance(error, Exception):
            # Without its message, which may name what a trace is not to tell.
            known = error if isinstance(error, TrifoldError) else TrifoldError
            self._span.set_status(Status(StatusCode.ERROR, known.reason))
        self._span.end()
