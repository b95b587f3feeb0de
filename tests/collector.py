"""An OpenTelemetry collector for tests: a real server that keeps the spans it is sent."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import trifold.shared.grpc_engine  # noqa: F401  # isort: skip - before grpc

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

_PATIENCE: Final = 30.0


@dataclass(frozen=True)
class Span:
    """One that was sent, with its service's name."""

    service: str
    name: str
    trace: bytes
    id: bytes
    parent: bytes
    began: int
    ended: int
    attributes: dict[str, int]
    events: tuple[str, ...]
    error: str


class Collector(TraceServiceServicer):
    """A context; `url` is for --traces."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.sent: list[bytes] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.url = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - named by the protocol
        self.sent.append(request.SerializeToString())
        for resource in request.resource_spans:
            told = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [_span(told["service.name"], span) for span in scope.spans]
        return pb.ExportTraceServiceResponse()

    def wait_until(self, complete: Callable[[Sequence[Span]], bool]) -> None:
        """Until the spans that have come are so; at most half a minute."""
        until = time.monotonic() + _PATIENCE
        while not complete(self.spans):
            assert time.monotonic() < until, f"there are {[(s.service, s.name) for s in self.spans]}"
            time.sleep(0.1)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(None)


def _span(service: str, span: Any) -> Span:
    return Span(
        service,
        span.name,
        span.trace_id,
        span.span_id,
        span.parent_span_id,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        {pair.key: pair.value.int_value for pair in span.attributes},
        tuple(event.name for event in span.events),
        span.status.message,
    )
