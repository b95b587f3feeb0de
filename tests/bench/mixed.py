"""Company: sessions that share the core's batches with 15 others, against the monolith, which has them alone.

All the time 16 sessions stream: prompts of a few tokens and of many, greedy and seeded; some are cancelled on
the way, and another one begins wherever one ends. Every token and the row that predicted it are compared.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Final
from unittest.mock import patch

from tests.bench.nano import held_out, split_nano, tokenizer
from tests.processes import Processes
from tests.streaming import Job
from trifold.cloud.core.engines.alone import Alone
from trifold.cloud.core.engines.registry import loader
from trifold.device import AsyncClient, Chunk, Sampling
from trifold.shared.runtime.monolith import Monolith
from trifold.shared.settings import CloudSettings
from trifold.shared.telemetry.scrape import Scrape

TOKENS: Final = 20_000
SESSIONS: Final = 16
JOBS: Final = 96
PROMPTS: Final = (1, 500)
LENGTHS: Final = (16, 200)
CANCELLED: Final = 0.2
"""Of all generations, somewhere on the way."""


ENGINES: Final[dict[str, dict[str, str]]] = {
    "onnxruntime": {},
    **{f"torch, {weights}": {"engine": "torch", "weights": weights} for weights in ("fp32", "bf16", "int8")},
}
"""By name, settings of the core."""


def main(count: int = TOKENS) -> None:
    """So many tokens at least, on each engine."""
    print("| engine | generations | cancelled | tokens | tokens that differ | rows that differ | batch |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder:
        bundle = split_nano(Path(folder) / "bundle", "--train")
        for name, settings in ENGINES.items():
            given = {f"TRIFOLD_CLOUD_{setting.upper()}": value for setting, value in settings.items()}
            with patch.dict(os.environ, given):
                tally, rows, sessions = _compare(bundle, count)
            figures = " | ".join(f"{figure:,}" for figure in tally.figures)
            print(f"| {name} | {figures} | {rows:.1f} rows of {sessions:.1f} sessions |", flush=True)
            if tally.tokens_changed or tally.rows_changed:
                sys.exit("company changes what a session gets")


def _compare(bundle: Path, count: int) -> tuple[Tally, float, float]:
    """The tally of the engine in the environment, and how many rows and sessions a batch had in the mean."""
    settings = CloudSettings.load(None, bundle=bundle, threads=1)
    # The shard is nobody's core but in a monolith, so there it is the one to compare with.
    core = None if settings.engine == "onnxruntime" else Alone.loader(loader(settings))
    jobs = _jobs(Monolith.load(bundle, threads=1, core=core))
    with Processes(bundle, "--threads", "1", "--metrics", "127.0.0.1:0") as tiers:
        tally = asyncio.run(_stream(tiers.edge, bundle, jobs, count))
        told = tiers.log("cloud").partition("metrics are at http://")[2].partition("/")[0]
        batches = Scrape.of(told)
    rows, sessions = (
        batches.value(f"trifold_iteration_{what}_sum") / batches.value(f"trifold_iteration_{what}_count")
        for what in ("tokens", "sessions")
    )
    return tally, rows, sessions


class Tally:
    """What was compared."""

    def __init__(self) -> None:
        self.generations = self.cancelled = self.tokens = self.tokens_changed = self.rows_changed = 0

    @property
    def figures(self) -> tuple[int, ...]:
        return self.generations, self.cancelled, self.tokens, self.tokens_changed, self.rows_changed

    def add(self, job: Job, chunks: list[Chunk], *, cancelled: bool) -> None:
        """Of a generation that was not cancelled nothing may be missing."""
        self.generations += 1
        self.cancelled += cancelled
        if not cancelled:
            self.tokens_changed += len(job.tokens) - len(chunks)
        for chunk, token in zip(chunks, job.tokens, strict=False):
            assert chunk.trace
            self.tokens += 1
            self.tokens_changed += chunk.token_ids != (token.id,)
            self.rows_changed += chunk.trace.row_digest != token.row_digest


async def _stream(edge: str, bundle: Path, jobs: list[Job], count: int) -> Tally:
    tally, rng = Tally(), random.Random(7)

    async def session(client: AsyncClient) -> None:
        while tally.tokens < count:
            job = rng.choice(jobs)
            cancelled = rng.random() < CANCELLED
            length = rng.randrange(1, len(job.tokens)) if cancelled else len(job.tokens)
            chunks: list[Chunk] = []
            async with job.start(client) as generation:
                async for chunk in generation:
                    chunks += [chunk] if chunk.token_ids else []
                    if len(chunks) == length:
                        break
            tally.add(job, chunks, cancelled=cancelled)

    async with AsyncClient(edge, bundle=bundle, timeout=60, threads=1) as client:
        await asyncio.gather(*(session(client) for _ in range(SESSIONS)))
    return tally


def _jobs(monolith: Monolith) -> list[Job]:
    """Half of them greedy."""
    rng, ids = random.Random(1), tokenizer().encode(held_out()).ids
    jobs = []
    for number in range(JOBS):
        start = rng.randrange(len(ids) - PROMPTS[1])
        prompt = ids[start : start + rng.randint(*PROMPTS)]
        seeded = Sampling(rng.choice([0.7, 1.0]), rng.choice([0, 50]), rng.choice([1.0, 0.95]), number)
        jobs.append(Job.ask(monolith, prompt, seeded if number % 2 else Sampling(), rng.randint(*LENGTHS)))
    return jobs
