"""Prefixes: the first token behind a beginning that is new, and one that the core has computed before."""

from __future__ import annotations

import asyncio
import random
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Final

from tests.bench.nano import held_out, split_nano, tokenizer
from tests.processes import Processes
from trifold.device import AsyncClient

TURNS: Final = 30
BEGINNINGS: Final = (128, 512, 960)
"""Tokens that prompts begin with alike; so many as QUESTION follow, which differ."""
QUESTION: Final = 32


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder:
        bundle = split_nano(Path(folder) / "bundle")
        with Processes(bundle, "--threads", "1") as tiers:
            asyncio.run(_compare(tiers.edge, bundle))


async def _compare(edge: str, bundle: Path) -> None:
    print("| tokens alike | new: first token, ms | known: first token, ms | ratio |")
    print("|---|---|---|---|")
    ids = tokenizer().encode(held_out()).ids
    async with AsyncClient(edge, bundle=bundle, threads=1) as client:
        for size in BEGINNINGS:
            new, known = [], []
            for _ in range(TURNS):
                beginning = random.sample(ids, size)
                new.append(await _first(client, beginning + random.sample(ids, QUESTION)))
                known.append(await _first(client, beginning + random.sample(ids, QUESTION)))
            ratio = median(known) / median(new)
            print(f"| {size:,} | {median(new):.1f} | {median(known):.1f} | {ratio:.2f} |", flush=True)


async def _first(client: AsyncClient, prompt: list[int]) -> float:
    """Milliseconds to the first token."""
    began = perf_counter()
    async for _ in client.generate(prompt, max_tokens=1, temperature=0):
        break
    return 1000 * (perf_counter() - began)
