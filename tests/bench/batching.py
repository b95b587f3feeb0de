"""Batches: a core that computes the rows of its sessions together against one that does not.

Both are processes that serve trifold-nano; edges are played by this process, which speaks the wire. First a
crowd, each of whom asks again when answered: from the answers of 16 to the core without batches comes what
is called its capacity. Then they come by chance, at shares of that capacity, the same to both. Last the
layers alone, without a network, beside transformers with a batch of as many.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Final

import numpy as np

from tests.bench.layers import ENGINES, SESSIONS
from tests.bench.nano import split_nano
from tests.wire import Peer
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.cli.service_process import ServiceProcess
from trifold.shared.runtime.codec import RowCodec

PROMPT: Final = 64
TOKENS: Final = 32
CROWDS: Final = (1, 16)
LOADS: Final = (0.5, 0.8, 0.95)
TURNS: Final = 5
SECONDS: Final = 6.0
WARM_UP: Final = 2.0

INTERPRETERS: Final = {
    "one by one": [sys.executable, "-m", "tests.bench.unbatched"],
    "batches": [sys.executable],
}

Ask = Callable[[], Coroutine[None, None, float]]
"""Asks for one answer; the seconds that it took."""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder, ExitStack() as processes:
        bundle = split_nano(Path(folder) / "nano")
        command = ["cloud", "serve", str(bundle), "--listen", "127.0.0.1:0", "--threads", "1"]
        # Near its capacity a core without batches gathers callers, and none is to be turned away.
        command += ["--streams", "1000"]
        cores = {
            name: processes.enter_context(ServiceProcess(command, interpreter=interpreter)).address
            for name, interpreter in INTERPRETERS.items()
        }
        asyncio.run(_main(bundle, cores))
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder:
        _beside_transformers(split_nano(Path(folder) / "nano"))


def _beside_transformers(bundle: Path) -> None:
    """Without a network."""
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in ENGINES}
    for _ in range(TURNS):
        for name, times in turns.items():
            command = [sys.executable, "-m", "tests.bench.layers", name, str(bundle)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            times.append(json.loads(done.stdout))
    print(f"\n| the core's layers, ms a step | {' | '.join(f'{n} together' for n in SESSIONS)} |")
    print(f"|{'---|' * (1 + len(SESSIONS))}")
    for name, times in turns.items():
        cells = [f"{statistics.median(turn[str(count)] for turn in times):.2f}" for count in SESSIONS]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


async def _main(bundle: Path, cores: dict[str, str]) -> None:
    async with AsyncExitStack() as peers:
        asks = {}
        for name, address in cores.items():
            peer = await peers.enter_async_context(Peer.at(address, "CoreService"))
            asks[name] = _asking(peer, bundle)
        rates: dict[tuple[str, int], list[float]] = defaultdict(list)
        for _ in range(TURNS):
            for name, ask in asks.items():
                for crowd in CROWDS:
                    rates[name, crowd].append(await _closed(ask, crowd))
        tokens = {kind: statistics.median(turns) for kind, turns in rates.items()}
        print("| core | tokens/s of one session | of 16 | 16 to one |\n|---|---|---|---|")
        for name in asks:
            one, many = (tokens[name, crowd] for crowd in CROWDS)
            print(f"| {name} | {one:.0f} | {many:.0f} | {many / one:.2f} |", flush=True)
        capacity = tokens["one by one", CROWDS[-1]] / TOKENS
        print(f"\n| of {capacity:.0f} answers/s | one by one, mean ms | batches | ratio |\n|---|---|---|---|")
        for load in LOADS:
            turns = [
                {name: await _open(ask, load * capacity) for name, ask in asks.items()} for _ in range(TURNS)
            ]
            apart, together = (statistics.median(turn[name] for turn in turns) for name in INTERPRETERS)
            ratio = statistics.median(turn["batches"] / turn["one by one"] for turn in turns)
            print(f"| {load:.0%} | {apart:.0f} | {together:.0f} | {ratio:.2f} |", flush=True)


def _asking(peer: Peer, bundle: Path) -> Ask:
    """An edge's session: a prompt in one step, and row after row as the answers come."""
    manifest = TierFolder.open(bundle, "cloud").manifest
    digest, codec = manifest.serving_digest, RowCodec(manifest.serving.codec, manifest.serving.spec.hidden)
    rows = np.random.default_rng(0).standard_normal((PROMPT + TOKENS, codec.hidden), np.float32)

    async def ask() -> float:
        began = time.perf_counter()
        talk = peer.call()
        await talk.open(digest, capacity=PROMPT + TOKENS)
        await talk.send_rows(codec, rows[:PROMPT], 0, logits_from=PROMPT - 1)
        await talk.result()
        for position in range(PROMPT, PROMPT + TOKENS - 1):
            await talk.send_rows(codec, rows[position : position + 1], position)
            await talk.result()
        await talk.close()
        return time.perf_counter() - began

    return ask


async def _closed(ask: Ask, callers: int) -> float:
    """Tokens a second of so many callers, each of whom asks again when it has its answer."""
    ended: list[float] = []

    async def again() -> None:
        while True:
            await ask()
            ended.append(time.perf_counter())

    began = time.perf_counter() + WARM_UP
    running = [asyncio.create_task(again()) for _ in range(callers)]
    await asyncio.sleep(WARM_UP + SECONDS)
    await _ended(running)
    return TOKENS * sum(began <= at < began + SECONDS for at in ended) / SECONDS


async def _open(ask: Ask, rate: float) -> float:
    """Mean milliseconds of an answer to callers who come by chance (a Poisson process), `rate` a second."""
    began = time.perf_counter()
    asked: list[tuple[float, asyncio.Task[float]]] = []
    at = began
    while at < began + WARM_UP + SECONDS:
        at += random.expovariate(rate)
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        asked.append((at, asyncio.create_task(ask())))
    await asyncio.wait([task for _, task in asked])
    return 1000 * statistics.mean(task.result() for at, task in asked if at >= began + WARM_UP)


async def _ended(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
