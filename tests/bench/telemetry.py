"""What metrics and traces cost a token: three tiers in one process, with and without them in turn."""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final
from unittest.mock import patch

from prometheus_client import Counter, Histogram

from tests.bench.nano import split_nano
from tests.collector import Collector
from tests.tiers import running_core, running_edge
from trifold.device import AsyncClient
from trifold.shared.telemetry import metrics, traces
from trifold.shared.telemetry.exposition import Exposition
from trifold.shared.telemetry.otlp import OtlpRecorder

TURNS: Final = 41
TOKENS: Final = 128
SCRAPE_SECONDS: Final = 1.0


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder, collector() as url:
        recorder = OtlpRecorder(url, "all")
        asyncio.run(_compare(split_nano(Path(folder) / "nano"), recorder))
        recorder.flush()
    print(f"\nCounting alone: {_counting():.1f} µs a token, all tiers.")


async def _compare(bundle: Path, recorder: OtlpRecorder) -> None:
    modes: dict[str, Callable[[ExitStack], object]] = {
        "neither": _without_metrics,
        "metrics": lambda _: None,
        "metrics and traces": lambda stack: stack.enter_context(patch.object(traces, "_recorder", recorder)),
    }
    found: dict[str, list[tuple[float, float]]] = {mode: [] for mode in modes}
    async with (
        running_core(bundle) as core,
        running_edge(bundle, core.address) as edge,
        AsyncClient(edge.address, bundle=bundle, threads=1) as client,
    ):
        shown = Exposition("127.0.0.1:0", {*metrics.EDGE, *metrics.DEVICE}, lambda: edge.service.readings())
        scraping = asyncio.create_task(_scrape(shown.url.split("/")[2]))
        for _ in range(TURNS):
            for mode, enter in modes.items():
                with ExitStack() as stack:
                    enter(stack)
                    found[mode].append(await _answer(client))
        scraping.cancel()
        shown.close()
    print("| | ms a token | added | processor, ms a token | added |")
    print("|---|---|---|---|---|")
    for mode, taken in found.items():
        figures = []
        for kind in (0, 1):
            differences = [
                one[kind] - other[kind] for one, other in zip(taken, found["neither"], strict=True)
            ]
            median = statistics.median(one[kind] for one in taken)
            figures += [f"{median:.3f}", f"{statistics.median(differences):+.3f}"]
        print(f"| {mode} | {' | '.join(figures)} |", flush=True)


def _without_metrics(stack: ExitStack) -> None:
    for kind, method in ((Counter, "inc"), (Histogram, "observe")):
        stack.enter_context(patch.object(kind, method, lambda *_: None))


async def _answer(client: AsyncClient) -> tuple[float, float]:
    """Milliseconds a token after the first, on the clock and of the processor."""
    generation = client.generate("import os\n", max_tokens=TOKENS + 1, eos=(), temperature=1, seed=1)
    await anext(generation)
    began, busy = time.perf_counter(), time.process_time()
    async for _ in generation:
        pass
    seconds = time.perf_counter() - began, time.process_time() - busy
    return seconds[0] * 1000 / TOKENS, seconds[1] * 1000 / TOKENS


async def _scrape(address: str) -> None:
    while True:
        await asyncio.to_thread(_get, address)
        await asyncio.sleep(SCRAPE_SECONDS)


def _get(address: str) -> None:
    connection = HTTPConnection(address, timeout=10)
    connection.request("GET", "/metrics")
    connection.getresponse().read()
    connection.close()


def _counting() -> float:
    """Microseconds for what is counted at a token: steps of two tiers, links at three ends, the device."""
    steps, link = metrics.Steps("token"), metrics.traffic("device-edge")
    rounds = 20_000
    began = time.process_time()
    for _ in range(rounds):
        for _ in range(2):
            steps.observe(10_000, 400_000)
            steps.note(1, 500_000)
        for _ in range(3):
            link.up(100)
            link.down(100)
        metrics.ROUND_TRIP.labels("edge-cloud").observe(0.0005)
        metrics.ROUND_TRIP.labels("device-edge").observe(0.0005)
        metrics.GENERATION_TOKENS.inc()
        metrics.TIME_PER_OUTPUT_TOKEN.observe(0.002)
    return (time.process_time() - began) * 1e6 / rounds


@contextmanager
def collector() -> Iterator[str]:
    """The URL of a collector in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    near, far = spawn.Pipe()
    process = spawn.Process(target=_collect, args=(far,), daemon=True)
    process.start()
    yield near.recv()
    process.kill()


def _collect(far: Connection) -> None:
    with Collector() as server:
        far.send(server.url)
        time.sleep(3600)
