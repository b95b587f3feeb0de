from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from prometheus_client import Counter, Histogram

from trifold.shared.errors import Unavailable
from trifold.shared.telemetry.exposition import Exposition
from trifold.shared.telemetry.scrape import Change, Scrape, Series


class Shown:
    """A process that counts events and times."""

    def __init__(self) -> None:
        self.events = Counter("seen", "Events.", ["kind"], registry=None)
        self.times = Histogram("took_seconds", "Times.", registry=None, buckets=(1.0, 2.0, 4.0))
        self.exposition = Exposition("127.0.0.1:0", [self.events, self.times], list)
        self.address = self.exposition.url.split("/")[2]


@pytest.fixture
def shown() -> Iterator[Shown]:
    process = Shown()
    yield process
    process.exposition.close()


def at(seconds: float, started: float = 100.0, **values: float) -> Scrape:
    series = {name: [Series({}, value)] for name, value in values.items()}
    return Scrape(seconds, {"process_start_time_seconds": [Series({}, started)], **series})


def test_a_scrape_has_what_a_process_shows(shown: Shown) -> None:
    shown.events.labels("good").inc(3)
    shown.events.labels("bad").inc(2)
    found = Scrape.of(shown.address)
    assert found.value("seen_total", kind="bad") == 2
    assert found.value("seen_total") == 5
    assert found.labels("seen_total", "kind") == ["good", "bad"]
    assert "seen_total" in found
    assert math.isnan(found.value("unseen_total"))


def test_a_quantile_is_of_the_observations_between_two_scrapes(shown: Shown) -> None:
    for _ in range(100):
        shown.times.observe(3.0)
    before = Scrape.of(shown.address)
    for value in [0.5] * 50 + [1.5] * 50:
        shown.times.observe(value)
    change = Change(Scrape.of(shown.address), before)
    assert change.quantile(0.25, "took_seconds") == pytest.approx(0.5)
    assert change.quantile(0.75, "took_seconds") == pytest.approx(1.5)
    assert Change(before).quantile(0.5, "took_seconds") == pytest.approx(3.0)
    assert math.isnan(Change(before, before).quantile(0.5, "took_seconds"))
    assert math.isnan(change.quantile(0.5, "untaken_seconds"))


def test_what_is_above_the_last_bound_counts_as_the_last_bound(shown: Shown) -> None:
    shown.times.observe(100.0)
    assert Change(Scrape.of(shown.address)).quantile(0.5, "took_seconds") == 4.0


def test_a_rate_is_of_the_time_between_two_scrapes_or_since_the_start() -> None:
    assert Change(at(110.0, events=40.0)).rate("events") == pytest.approx(4.0)
    assert Change(at(112.0, events=50.0), at(110.0, events=40.0)).rate("events") == pytest.approx(5.0)
    assert math.isnan(Change(at(110.0)).rate("events"))


def test_a_process_that_was_restarted_has_begun_anew() -> None:
    before, now = at(110.0, events=40.0), at(125.0, started=120.0, events=10.0)
    assert Change(now, before).rate("events") == pytest.approx(2.0)


def test_who_is_not_there_or_shows_something_else_is_named() -> None:
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:9 shows no metrics: Connection refused"):
        Scrape.of("127.0.0.1:9")
    with pytest.raises(Unavailable, match="nowhere shows no metrics"):
        Scrape.of("nowhere")
    with pytest.raises(Unavailable, match="localhost:abc shows no metrics: nonnumeric port"):
        Scrape.of("localhost:abc")


@pytest.mark.parametrize(
    ("status", "told"), [(HTTPStatus.OK, ".*<!DOCTYPE html>"), (HTTPStatus.FORBIDDEN, "it answers 403")]
)
def test_a_page_in_place_of_metrics_is_told_in_a_line(status: HTTPStatus, told: str) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"<!DOCTYPE html><html>" + b"x" * 1000)

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.handle_request).start()
        with pytest.raises(Unavailable, match=f"shows no metrics: {told}") as raised:
            Scrape.of(f"127.0.0.1:{server.server_port}")
    assert len(raised.value.message) < 200
