"""How long a generation takes, for the metrics of the process and for its trace."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from time import perf_counter
from types import TracebackType
from typing import Final, Self

from trifold.device.client.text import Transcript
from trifold.device.client.trace import Trace, Work
from trifold.shared.errors import Cancelled
from trifold.shared.telemetry.metrics import (
    GENERATION_TOKENS,
    PROMPT_TOKENS,
    REQUEST_LATENCY,
    REQUESTS,
    ROUND_TRIP,
    TIME_PER_OUTPUT_TOKEN,
    TIME_TO_FIRST_TOKEN,
)
from trifold.shared.telemetry.traces import Span

_ROUND_TRIP: Final = ROUND_TRIP.labels("device-edge")

log = logging.getLogger(__name__)


class Timing:
    """Of one generation, from here on to the end of the context. `span` ends with it."""

    def __init__(self, span: Span, transcript: Transcript, prompt_tokens: int) -> None:
        self._span = span
        self._transcript = transcript
        self._prompt_tokens = prompt_tokens
        self._tokens = 0
        self._first = 0.0
        self._began = perf_counter()

    def token(self, how: Trace, works: Sequence[Work]) -> None:
        """Another token was committed; `works` led to it.

        What the caller does between two tokens is not counted as time per token.
        """
        self._tokens += 1
        GENERATION_TOKENS.inc()
        if self._tokens == 1:
            self._first = perf_counter() - self._began
            TIME_TO_FIRST_TOKEN.observe(self._first)
            PROMPT_TOKENS.inc(self._prompt_tokens)
        else:
            TIME_PER_OUTPUT_TOKEN.observe(sum(map(_needed_ns, works)) / 1e9)
        if how.rows == 1:
            _ROUND_TRIP.observe(how.links[0].network_ns / 1e9)
        self._span.step(
            "token" if how.rows == 1 else "prompt",
            works[0].delivery.sent_ns,
            works[-1].done_ns,
            positions=how.rows,
            queue_ns=how.tiers[0].queue_ns,
            compute_ns=how.tiers[0].compute_ns,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = isinstance(error, Exception) and not isinstance(error, Cancelled)
        ended = "error" if failed else self._transcript.finish_reason or "cancelled"
        seconds = perf_counter() - self._began
        REQUESTS.labels(ended).inc()
        REQUEST_LATENCY.observe(seconds)
        self._span.end(error)
        if failed:
            log.info("failed after %d tokens and %.3f s: %s", self._tokens, seconds, error)
            return
        log.info(
            "%d tokens after %d of the prompt: the first after %.3f s, all in %.3f s (%s)",
            self._tokens,
            self._prompt_tokens,
            self._first,
            seconds,
            ended,
        )


def _needed_ns(work: Work) -> int:
    """On the clock of monotonic_ns(), which on Linux is that of perf_counter_ns()."""
    return work.delivery.received_ns - work.delivery.sent_ns + work.queue_ns + work.compute_ns
