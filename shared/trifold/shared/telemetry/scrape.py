"""The metrics of a process as it shows them, at one moment and between two."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from trifold.shared.errors import Unavailable

_TIMEOUT: Final = 2.0

_STARTED: Final = "process_start_time_seconds"


@dataclass(frozen=True)
class Series:
    """One series of a metric, by its labels, and its value."""

    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True)
class Scrape:
    """What a process showed `at` a time, in seconds since the epoch."""

    at: float
    metrics: Mapping[str, list[Series]] = field(default_factory=dict)

    @classmethod
    def of(cls, address: str) -> Scrape:
        """What the process with its metrics at HOST:PORT shows now. Raises Unavailable."""
        metrics: dict[str, list[Series]] = {}
        try:
            with closing(HTTPConnection(address, timeout=_TIMEOUT)) as connection:
                connection.request("GET", "/metrics")
                response = connection.getresponse()
                text = response.read().decode()
            if response.status != 200:
                raise HTTPException(f"it answers {response.status}")
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    metrics.setdefault(sample.name, []).append(Series(sample.labels, sample.value))
        except (OSError, HTTPException, ValueError) as error:
            told = getattr(error, "strerror", None) or str(error) or type(error).__name__
            # What is no metric is told as it is, which may be a page in one line.
            hint = ": was --metrics given there?" if isinstance(error, ConnectionRefusedError) else ""
            raise Unavailable(f"{address} shows no metrics: {told:.100}{hint}") from None
        return cls(time.time(), metrics)

    def __contains__(self, name: str) -> bool:
        return name in self.metrics

    def series(self, name: str, **labels: str) -> Iterator[Series]:
        """Those of a metric that have these labels."""
        for series in self.metrics.get(name, ()):
            if labels.items() <= series.labels.items():
                yield series

    def value(self, name: str, **labels: str) -> float:
        """The sum of these series; not a number where there are none."""
        values = [series.value for series in self.series(name, **labels)]
        return sum(values) if values else math.nan

    def labels(self, name: str, label: str) -> list[str]:
        """The values of a label, as they come."""
        return list(dict.fromkeys(series.labels[label] for series in self.series(name)))


class Change:
    """What happened in a process between two scrapes, or since it began."""

    def __init__(self, now: Scrape, before: Scrape | None = None) -> None:
        """A process that was restarted meanwhile has begun anew."""
        started = now.value(_STARTED)
        again = before is None or before.value(_STARTED) != started
        self.now = now
        self._before = Scrape(started) if before is None or again else before
        self._seconds = max(now.at - self._before.at, 1e-3)

    def rate(self, name: str, **labels: str) -> float:
        """By how much these counters grew in a second; not a number where there are none."""
        return self._growth(name, **labels) / self._seconds

    def quantile(self, q: float, name: str, **labels: str) -> float:
        """Of what a histogram observed in that time, as Prometheus estimates it; not a number without any."""
        name = f"{name}_bucket"
        counts = {float(le): self._growth(name, **labels, le=le) for le in self.now.labels(name, "le")}
        wanted = q * max(counts.values(), default=0.0)
        lower, below = 0.0, 0.0
        for upper, count in sorted(counts.items()):
            if count >= wanted > 0:
                share = (wanted - below) / (count - below)
                return lower if math.isinf(upper) else lower + (upper - lower) * share
            lower, below = upper, count
        return math.nan

    def _growth(self, name: str, **labels: str) -> float:
        before = self._before.value(name, **labels)
        return self.now.value(name, **labels) - (0.0 if math.isnan(before) else before)
