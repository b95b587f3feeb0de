from __future__ import annotations

import socket
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse

import pytest
from prometheus_client import Counter
from prometheus_client.parser import text_string_to_metric_families

from trifold.shared.errors import ConfigError
from trifold.shared.telemetry.exposition import Exposition
from trifold.shared.telemetry.metrics import KV_CACHE


class Held:
    """Something that has a value, which is read when somebody asks."""

    def __init__(self) -> None:
        self.bytes = 0

    def readings(self) -> Iterator[object]:
        yield KV_CACHE.of(self.bytes)


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def shown(held: Held) -> Iterator[Exposition]:
    counter = Counter("events", "What happens.", ["kind"], registry=None)
    counter.labels("good").inc(3)
    exposition = Exposition("127.0.0.1:0", [counter], held.readings)  # type: ignore[arg-type]
    yield exposition
    exposition.close()


def ask(shown: Exposition, method: str, path: str) -> tuple[HTTPResponse, str]:
    connection = HTTPConnection(shown.url.split("/")[2], timeout=10)
    connection.request(method, path)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response, text


def samples(shown: Exposition) -> dict[str, float]:
    _, text = ask(shown, "GET", "/metrics")
    return {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}


def test_what_is_counted_is_shown_and_what_somebody_has_is_read_at_that_moment(
    shown: Exposition, held: Held
) -> None:
    assert samples(shown)["events_total"] == 3
    assert samples(shown)["trifold_kv_cache_bytes"] == 0
    held.bytes = 512
    assert samples(shown)["trifold_kv_cache_bytes"] == 512
    assert samples(shown)["process_resident_memory_bytes"] > 1e6


def test_no_series_says_when_a_counter_was_made(shown: Exposition) -> None:
    assert not [name for name in samples(shown) if name.endswith("_created")]


@pytest.mark.parametrize("path", ["/", "/favicon.ico", "/metrics/x", "/../metrics2", "//metrics.txt"])
def test_there_is_nothing_but_metrics(shown: Exposition, path: str) -> None:
    response, text = ask(shown, "GET", path)
    assert response.status == 404
    assert "events_total" not in text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_metrics_can_only_be_read(shown: Exposition, method: str) -> None:
    response, text = ask(shown, method, "/metrics")
    assert response.status == 501
    assert "events_total" not in text


def test_somebody_who_asks_for_nothing_does_not_keep_others_waiting(shown: Exposition) -> None:
    host, port = shown.url.split("/")[2].split(":")
    with socket.create_connection((host, int(port))) as silent:
        silent.sendall(b"GET /metr")
        assert samples(shown)["events_total"] == 3


def test_an_address_that_is_taken_is_told(shown: Exposition) -> None:
    address = shown.url.split("/")[2]
    with pytest.raises(ConfigError, match=f"cannot show metrics at {address}"):
        Exposition(address, [], list)
