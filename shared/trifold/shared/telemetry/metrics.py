"""Every metric there is: what a process counts and times, and what is read from it when somebody asks.

What counts is declared without a registry; a process shows the group that it has a use for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Final, NamedTuple

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from trifold.proto.v1.session_pb2 import TierInfo
from trifold.shared.errors import ERRORS

_PREFIX: Final = "trifold_"

_BRIEF: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
"""Seconds, for what happens at every token."""

_LONG: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
"""Seconds, for what happens once in a request."""

_MANY: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

FORGOTTEN: Final = "FORGOTTEN"
"""Cause of a resume: the tier does not know the session, as after a restart or when its lease was over."""


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(_PREFIX + name, text, labels, registry=None)


def _histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = _BRIEF) -> Histogram:
    return Histogram(_PREFIX + name, text, labels, registry=None, buckets=buckets)


class Gauge(NamedTuple):
    """A value that some object has: it is read when somebody asks, and kept nowhere else."""

    name: str
    text: str

    def of(self, value: float) -> Metric:
        return GaugeMetricFamily(_PREFIX + self.name, self.text, value=value)


class Total(Gauge):
    """As a Gauge, of what only grows."""

    def of(self, value: float) -> Metric:
        return CounterMetricFamily(_PREFIX + self.name, self.text, value=value)


# Of a site's devices, in vLLM's words.
TIME_TO_FIRST_TOKEN: Final = _histogram(
    "time_to_first_token_seconds", "From the beginning of a generation to its first token.", buckets=_LONG
)
TIME_PER_OUTPUT_TOKEN: Final = _histogram(
    "time_per_output_token_seconds", "From sending a token to having decided on the next, through all tiers."
)
REQUEST_LATENCY: Final = _histogram(
    "e2e_request_latency_seconds", "From the beginning of a generation to its end.", buckets=_LONG
)
REQUESTS: Final = _counter(
    "request_success",
    "Generations that came to an end, by how: stop, length, cancelled, error.",
    "finished_reason",
)
PROMPT_TOKENS: Final = _counter("prompt_tokens", "Tokens of the prompts of all generations.")
GENERATION_TOKENS: Final = _counter("generation_tokens", "Tokens generated.")

# Of tiers. A step is of `kind` prompt, token or, in training, batch.
STEP: Final = _histogram("step_seconds", "From the arrival of a step at a tier to its answer.", "kind")
QUEUE: Final = _histogram("queue_time_seconds", "For which a step waited for the tier's engine.", "kind")
COMPUTE: Final = _histogram("compute_time_seconds", "For which a step had the tier's engine.", "kind")
POSITIONS: Final = _counter("positions", "Positions computed, also those computed again.", "kind")

# Of the core, whose batches have rows of several sessions.
BATCH_ROWS: Final = _histogram("iteration_tokens", "Positions that were computed together.", buckets=_MANY)
BATCH_SESSIONS: Final = _histogram(
    "iteration_sessions", "Sessions whose positions were computed together.", buckets=_MANY
)

PREFIX_QUERIES: Final = _counter(
    "prefix_cache_queries", "Positions looked for among those of other sessions."
)
PREFIX_HITS: Final = _counter("prefix_cache_hits", "Positions taken from other sessions instead of computed.")

# Of links. `direction` is up towards the cloud, or down. A step is one message each way.
LINK_BYTES: Final = _counter("link_bytes", "Bytes of messages over a link.", "link", "direction")
LINK_MESSAGES: Final = _counter("link_messages", "Messages over a link.", "link", "direction")
ROUND_TRIP: Final = _histogram(
    "round_trip_seconds",
    "What a step of one position takes at the near end of a link and neither end accounts for.",
    "link",
)

# Of every process.
RESUMES: Final = _counter("resumes", "Sessions gone on with, by how their stream before ended.", "cause")
REFUSALS: Final = _counter("refusals", "Calls refused or broken off, by reason.", "reason")
LOOP_LAG: Final = _histogram("event_loop_lag_seconds", "How late the event loop does what is due.")

TIER: Final = (STEP, QUEUE, COMPUTE, POSITIONS, LINK_BYTES, LINK_MESSAGES, RESUMES, REFUSALS, LOOP_LAG)
CORE: Final = (*TIER, BATCH_ROWS, BATCH_SESSIONS, PREFIX_QUERIES, PREFIX_HITS)
EDGE: Final = (*TIER, ROUND_TRIP)
TRAINING: Final = (QUEUE, COMPUTE, LINK_BYTES, LINK_MESSAGES, REFUSALS, LOOP_LAG)
DEVICE: Final = (
    TIME_TO_FIRST_TOKEN,
    TIME_PER_OUTPUT_TOKEN,
    REQUEST_LATENCY,
    REQUESTS,
    PROMPT_TOKENS,
    GENERATION_TOKENS,
    ROUND_TRIP,
    RESUMES,
    REFUSALS,
    LOOP_LAG,
)

RUNNING: Final = Gauge(
    "num_requests_running", "Sessions that have a stream; at a device service, answers that are given."
)
WAITING: Final = Gauge(
    "num_requests_waiting", "Sessions whose step waits for the engine; answers that wait for a place."
)
LIMIT: Final = Gauge("num_requests_limit", "Most that may run at a time.")
LEASED: Final = Gauge("num_sessions_leased", "Sessions kept although their stream was lost.")
KV_CACHE: Final = Gauge("kv_cache_bytes", "KV reserved by sessions.")
KV_CACHE_LIMIT: Final = Gauge("kv_cache_limit_bytes", "Most KV that sessions may reserve.")
EXACT: Final = Gauge("exact", "Whether the numerics self-test was passed.")
CERTIFICATE_EXPIRY: Final = Gauge(
    "certificate_expiry_timestamp_seconds", "When the node's certificate runs out."
)
TRAIN_SITES: Final = Gauge("train_sites", "Sites that train with this core.")
TRAIN_BATCHES: Final = Gauge("train_batches", "Batches held for them.")
TRAIN_ACTIVATIONS: Final = Gauge("train_activation_bytes", "Activations kept for gradients.")
TRAIN_ACTIVATIONS_LIMIT: Final = Gauge("train_activation_limit_bytes", "Most that may be kept.")
TRAIN_RECOMPUTED: Final = Total("train_recomputed", "Batches whose activations were computed again.")


_BUILD: Final = _PREFIX + "build"
_RUNS: Final = "What a process runs, with the beginnings of the digests; always 1."
_ABOUT: Final = ("tier", "version", "bundle", "adapter", "provider", "fingerprint")


def build(tier: TierInfo, bundle: str, adapter: str = "") -> Iterator[Metric]:
    """What runs, and whether it is exact."""
    told = (tier.tier, tier.version, bundle[:12], adapter[:12] or "base", tier.provider, tier.fingerprint)
    yield InfoMetricFamily(_BUILD, _RUNS, value=dict(zip(_ABOUT, told, strict=True)))
    yield EXACT.of(tier.exact)


class Turns:
    """What is observed of the turns that one kind of work has at the engine."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._queue = QUEUE.labels(kind)
        self._compute = COMPUTE.labels(kind)

    def observe(self, queue_ns: int, compute_ns: int) -> None:
        self._queue.observe(queue_ns / 1e9)
        self._compute.observe(compute_ns / 1e9)


class Steps(Turns):
    """As Turns, of steps of a session."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self._whole = STEP.labels(kind)
        self._positions = POSITIONS.labels(kind)

    def note(self, positions: int, total_ns: int) -> None:
        self._whole.observe(total_ns / 1e9)
        self._positions.inc(positions)


class Traffic:
    """What goes over one link."""

    def __init__(self, link: str) -> None:
        self._bytes_up, self._up = (counter.labels(link, "up") for counter in (LINK_BYTES, LINK_MESSAGES))
        self._bytes_down, self._down = (
            counter.labels(link, "down") for counter in (LINK_BYTES, LINK_MESSAGES)
        )

    def up(self, size: int) -> None:
        self._bytes_up.inc(size)
        self._up.inc()

    def down(self, size: int) -> None:
        self._bytes_down.inc(size)
        self._down.inc()


@cache
def traffic(link: str) -> Traffic:
    """Links are few: they have the names of what is at either end."""
    return Traffic(link)


class Described(NamedTuple):
    """A metric as the documentation has it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str


def described() -> Iterator[Described]:
    """All metrics."""
    for metric in globals().values():
        if isinstance(metric, Gauge):
            total = isinstance(metric, Total)
            name = _PREFIX + metric.name + "_total" * total
            yield Described(name, "counter" if total else "gauge", (), metric.text)
        elif isinstance(metric, Counter | Histogram):
            (family,) = metric.describe()
            name = family.name + "_total" * (family.type == "counter")
            yield Described(name, family.type, metric._labelnames, family.documentation)
    yield Described(f"{_BUILD}_info", "info", tuple(_ABOUT), _RUNS)


def _from_zero(counter: Counter, values: Iterable[str]) -> None:
    """A counter that appears with its first event would hide just this one from rate()."""
    for value in values:
        counter.labels(value)


_from_zero(REFUSALS, ERRORS)
_from_zero(RESUMES, ("UNAVAILABLE", "DEADLINE_EXCEEDED", "OVERLOADED", "STALE_EPOCH", FORGOTTEN))
_from_zero(REQUESTS, ("stop", "length", "cancelled", "error"))
