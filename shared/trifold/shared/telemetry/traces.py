"""One trace of a request over all its tiers, where it is asked for; elsewhere none of it is even loaded.

A tier hands the trace on in the metadata of its calls, as W3C's traceparent. Spans say when, how long and how
many positions; they never hold text, token ids, rows, experts or the ids of sessions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol
from urllib.parse import urlsplit

from trifold.shared.errors import ConfigError
from trifold.shared.session.channel import on_loopback

TRACEPARENT: Final = "traceparent"

Metadata = tuple[tuple[str, str], ...]


class Span:
    """What one tier does for a request. This one is kept nowhere: there are no traces."""

    @property
    def metadata(self) -> Metadata:
        """For a call to the next tier, so that its span comes below this one."""
        return ()

    def step(self, name: str, began_ns: int, ended_ns: int, **numbers: int) -> None:
        """Something that took from `began_ns` to `ended_ns` on the clock of perf_counter_ns()."""

    def event(self, name: str, reason: str) -> None:
        """Something that happens now."""

    def end(self, error: BaseException | None = None) -> None: ...


class Recorder(Protocol):
    """Makes spans that are kept."""

    def span(self, name: str, parent: str) -> Span: ...
    def flush(self) -> None: ...


NOT_TRACED: Final = Span()

_recorder: Recorder | None = None


def export(to: str | None, tier: str, *, insecure: bool = False) -> None:
    """Sends the spans of this process, a `tier`, to the collector at the URL `to`, if any, by OTLP over gRPC.

    Raises ConfigError without the extra `telemetry`, and for http off loopback unless that is `insecure`.
    """
    global _recorder
    if to is None:
        return
    url = urlsplit(to)
    if url.scheme == "http" and not (insecure or on_loopback(f"{url.hostname}:0")):
        raise ConfigError(f"{to} is not on loopback: send traces by https, or give --insecure")
    try:
        from trifold.shared.telemetry.otlp import OtlpRecorder
    except ModuleNotFoundError as error:
        needed = f"--traces needs the package {error.name}"
        raise ConfigError(f"{needed}: install Trifold with the extra 'telemetry'") from None
    _recorder = OtlpRecorder(to, tier)


def begin(name: str, metadata: Iterable[tuple[str, str | bytes]] = ()) -> Span:
    """A span below the one that a caller's `metadata` tells of, or a new trace; it must be ended."""
    if _recorder is None:
        return NOT_TRACED
    parent = next((value for key, value in metadata if key == TRACEPARENT), "")
    return _recorder.span(name, parent if isinstance(parent, str) else "")


@contextmanager
def span(name: str, metadata: Iterable[tuple[str, str | bytes]] = ()) -> Iterator[Span]:
    """As begin(); it ends with the context, and with the error that does."""
    begun = begin(name, metadata)
    try:
        yield begun
    except BaseException as error:
        begun.end(error)
        raise
    begun.end()


def flush() -> None:
    """Sends what has not been sent; takes a moment at most."""
    if _recorder:
        _recorder.flush()
