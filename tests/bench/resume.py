"""How long a session at 256 positions waits for its next token after a loss; restarts are included."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from tests.bench.nano import held_out, split_nano, tokenizer
from tests.network.proxy import Proxy
from tests.processes import Processes, Service
from trifold.device import AsyncClient

POSITIONS: Final = 256
TIMES: Final = 40
TEMPERATURE: Final = 1.0


def main() -> None:
    print("| lost at 256 positions | times | median, s | 99th percentile, s |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder:
        asyncio.run(_measure(split_nano(Path(folder) / "bundle"), Path(folder)))


async def _measure(bundle: Path, folder: Path) -> None:
    with Processes(bundle) as tiers:

        async def restart(service: Service) -> None:
            tiers.kill(service)
            await asyncio.to_thread(tiers.start, service)

        async with Proxy(tiers.edge) as proxy:
            await _report("connection to the edge", lambda: _loss(bundle, proxy.address, proxy.cut))
        await _report(
            "core, killed and restarted", lambda: _loss(bundle, tiers.edge, lambda: restart("cloud"))
        )
        await _report(
            "edge, killed and restarted", lambda: _loss(bundle, tiers.edge, lambda: restart("edge"))
        )
        numbers = iter(range(TIMES))
        await _report(
            "device, killed and resumed", lambda: _death(tiers, folder / f"journal-{next(numbers)}")
        )


async def _report(what: str, once: Callable[[], Awaitable[float]]) -> None:
    seconds = [await once() for _ in range(TIMES)]
    worst = statistics.quantiles(seconds, n=100, method="inclusive")[98]
    print(f"| {what} | {TIMES} | {statistics.median(seconds):.3f} | {worst:.3f} |", flush=True)


async def _loss(bundle: Path, edge: str, lose: Callable[[], Awaitable[None]]) -> float:
    """Seconds from a loss to the next token."""
    async with AsyncClient(edge, bundle=bundle, threads=1, timeout=60) as client:
        prompt = tokenizer().encode(held_out()).ids[: POSITIONS - 8]
        generation = client.generate(prompt, max_tokens=64, temperature=TEMPERATURE, eos=())
        async with generation:
            for _ in range(8):
                await anext(generation)
            began = time.perf_counter()
            losing = asyncio.ensure_future(lose())
            while True:
                # Tokens that were on their way already do not count.
                chunk = await anext(generation)
                if chunk.trace and chunk.trace.resumed:
                    break
            seconds = time.perf_counter() - began
            await losing
            return seconds


async def _death(tiers: Processes, journal: Path) -> float:
    """Seconds from the start of `trifold generate --resume` to its first new token."""
    command = [sys.executable, "-m", "trifold.shared.cli.main", "generate", "--edge", tiers.edge, "--json"]
    command += ["--bundle", str(tiers.bundle), "--threads", "1"]
    text = tokenizer().decode(tokenizer().encode(held_out()).ids[: POSITIONS // 2])
    prompt = ["--prompt", text, "--max-tokens", "400", "--temperature", str(TEMPERATURE)]
    first = await _start([*command, *prompt, "--journal", str(journal)])
    assert first.stdout
    for _ in range(POSITIONS // 2):
        await first.stdout.readline()
    first.kill()
    await first.wait()
    began = time.perf_counter()
    second = await _start([*command, "--resume", str(journal)])
    assert second.stdout
    replayed = json.loads(await second.stdout.readline())
    assert replayed["replayed"]
    await second.stdout.readline()
    seconds = time.perf_counter() - began
    second.kill()
    await second.wait()
    return seconds


async def _start(command: list[str]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)


if __name__ == "__main__":
    main()
