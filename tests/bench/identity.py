"""The split against the monolith, token by token and row by row, while everything is being killed.

Half of the generations are greedy, half seeded. Some sessions run in this process, in parallel and with
prompts cut into chunks of several sizes; others in processes of their own, which are killed and go on from
their journals. All the while core and edge are killed in turn and started again.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.bench.nano import held_out, split_nano, tokenizer
from tests.processes import Processes, Service
from trifold.device import AsyncClient, Sampling
from trifold.device.client.generation import Generation
from trifold.shared.errors import Unavailable
from trifold.shared.runtime.monolith import Monolith, Token

TOKENS: Final = 20_000
KILLS: Final = 20
SESSIONS: Final = 6
DEVICES: Final = 2
LONGEST: Final = 160
RUN: Final = 8
CHUNKS: Final = (512, 64, 17, 5)
CUTS: Final = {"2/6": "norm and head on the device", "2/5": "an attention layer on the device"}


@dataclass(frozen=True)
class Job:
    """One generation: what it is asked, and what the monolith answers."""

    prompt: str
    sampling: Sampling
    tokens: tuple[Token, ...]


@dataclass
class Tally:
    """What was compared, and what was wrong with it."""

    tokens: int = 0
    greedy: int = 0
    differ: int = 0
    lost: int = 0
    repeated: int = 0
    rows: int = 0
    rows_differ: int = 0
    resumes: int = 0
    kills: Counter[str] = field(default_factory=Counter)

    def add(self, job: Job, chunks: Sequence[dict[str, Any]]) -> None:
        """Compares the chunks of a generation (as JSON has them) with the monolith's tokens and rows."""
        got = [token for chunk in chunks for token in chunk["token_ids"]]
        wanted = [token.id for token in job.tokens]
        self.tokens += len(wanted)
        self.greedy += len(wanted) * (job.sampling.temperature == 0)
        self.differ += sum(a != b for a, b in zip(got, wanted, strict=False))
        self.lost += max(0, len(wanted) - len(got))
        self.repeated += max(0, len(got) - len(wanted))
        rows = {token.position: token.row_digest for token in job.tokens}
        for trace in (chunk["trace"] for chunk in chunks if chunk["trace"]):
            self.rows += 1
            self.rows_differ += rows.get(trace["position"]) != trace["row_digest"]
            self.resumes += trace["resumed"]


def main() -> None:
    print(
        "| cuts | tokens (greedy) | kills of core, edge, device | resumes | differ | lost | repeated "
        "| rows compared | rows that differ | distinct 8-grams |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    wrong = 0
    for cuts, meaning in CUTS.items():
        with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder:
            bundle = split_nano(Path(folder) / "bundle", "--cuts", cuts)
            jobs = list(_jobs(Monolith.load(bundle, threads=1)))
            tally = asyncio.run(_run(bundle, jobs, Path(folder)))
        kills = ", ".join(str(tally.kills[tier]) for tier in ("cloud", "edge", "device"))
        distinct = _distinct([[token.id for token in job.tokens] for job in jobs])
        row = [
            f"{cuts}: {meaning}",
            f"{tally.tokens:,} ({tally.greedy:,})",
            kills,
            tally.resumes,
            tally.differ,
        ]
        row += [tally.lost, tally.repeated, f"{tally.rows:,}", tally.rows_differ, f"{distinct:.1%}"]
        print(f"| {' | '.join(map(str, row))} |", flush=True)
        wrong += tally.differ + tally.lost + tally.repeated + tally.rows_differ
    if wrong:
        sys.exit("the split is not identical to the monolith")


def _jobs(monolith: Monolith) -> Iterator[Job]:
    """Generations from held-out text of many lengths until there are tokens enough.

    A small model soon repeats itself, above all when it is greedy, and repeated text is a weak test: every
    generation ends before it says what has been said.
    """
    rng, text = random.Random(1), held_out()
    said: set[tuple[int, ...]] = set()
    tokens = 0
    while tokens < TOKENS:
        start = rng.randrange(len(text) - 3000)
        prompt = text[start : start + rng.choice([12, 60, 300, 1500])]
        sampling = Sampling()
        if rng.random() < 0.4:
            sampling = Sampling(
                rng.choice([0.7, 1.0]), rng.choice([0, 50]), rng.choice([1.0, 0.95]), rng.getrandbits(64)
            )
        answer: list[Token] = []
        for token in monolith.generate(tokenizer().encode(prompt).ids, sampling, LONGEST):
            answer.append(token)
            run = tuple(each.id for each in answer[-RUN:])
            if len(run) == RUN and run in said:
                break
            said.add(run)
        tokens += len(answer)
        yield Job(prompt, sampling, tuple(answer))


async def _run(bundle: Path, jobs: Sequence[Job], folder: Path) -> Tally:
    tally = Tally()
    waiting = list(enumerate(jobs))
    with Processes(bundle) as tiers:
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(
                    AsyncClient(tiers.edge, bundle=bundle, timeout=120, threads=1, chunk=chunk)
                )
                for chunk in CHUNKS
            ]
            killer = asyncio.create_task(_kill_services(tiers, tally))
            async with asyncio.TaskGroup() as group:
                for number in range(SESSIONS):
                    client = clients[number % len(clients)]
                    group.create_task(_generate_here(client, waiting, tally))
                for seed in range(DEVICES):
                    group.create_task(_generate_in_processes(tiers, waiting, folder, tally, killer, seed))
            await killer
    return tally


async def _generate_here(client: AsyncClient, waiting: list[tuple[int, Job]], tally: Tally) -> None:
    while waiting:
        _, job = waiting.pop()
        chunks: list[dict[str, Any]] = []
        while not chunks:
            # A first open is not repeated by the client: here the edge may just have been killed.
            with suppress(Unavailable):
                async for chunk in _begin(client, job):
                    chunks.append({"token_ids": chunk.token_ids, "trace": chunk.trace and vars(chunk.trace)})
        tally.add(job, chunks)


def _begin(client: AsyncClient, job: Job) -> Generation:
    return client.generate(
        job.prompt,
        max_tokens=len(job.tokens),
        temperature=job.sampling.temperature,
        top_k=job.sampling.top_k,
        top_p=job.sampling.top_p,
        seed=job.sampling.seed,
    )


async def _generate_in_processes(
    tiers: Processes,
    waiting: list[tuple[int, Job]],
    folder: Path,
    tally: Tally,
    killer: asyncio.Task[None],
    seed: int,
) -> None:
    """Devices in processes of their own, each killed once or twice before it may finish."""
    rng = random.Random(seed)
    while waiting and (tally.kills["device"] < KILLS or not killer.done()):
        number, job = waiting.pop()
        sampling = job.sampling
        journal = folder / f"journal-{number}"
        arguments = ["--prompt", job.prompt, "--max-tokens", len(job.tokens), "--journal", journal]
        arguments += ["--temperature", sampling.temperature, "--seed", sampling.seed]
        arguments += ["--top-k", sampling.top_k, "--top-p", sampling.top_p]
        chunks: list[dict[str, Any]] = []
        for _ in range(rng.choice([1, 2])):
            shown = await _device(tiers, arguments, kill_after=rng.randrange(1, 30))
            tally.kills["device"] += bool(shown) and not shown[-1]["finish_reason"]
            # What it showed must come again from its journal, and is compared there.
            chunks += [{"token_ids": [], "trace": chunk["trace"]} for chunk in shown]
            arguments = ["--resume", journal]
        chunks += await _device(tiers, arguments)
        tally.add(job, chunks)


async def _device(tiers: Processes, arguments: Sequence[object], kill_after: int = 0) -> list[dict[str, Any]]:
    """The chunks that `trifold generate` prints until its end, or until it is killed after so many."""
    common = [
        "--edge",
        tiers.edge,
        "--bundle",
        tiers.bundle,
        "--timeout",
        120,
        "--threads",
        1,
        "--json",
        "--trace",
    ]
    device = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "trifold.shared.cli.main", "generate", *map(str, [*common, *arguments])],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert device.stdout
    chunks = []
    while (line := await device.stdout.readline()).endswith(b"\n"):
        chunks.append(json.loads(line))
        if len(chunks) == kill_after and not chunks[-1]["finish_reason"]:
            device.kill()
    await device.wait()
    return chunks


async def _kill_services(tiers: Processes, tally: Tally) -> None:
    """Kills core and edge in turn, until both have been killed often enough."""
    rng = random.Random(3)
    services: tuple[Service, Service] = ("cloud", "edge")
    while min(tally.kills[service] for service in services) < KILLS:
        for service in services:
            await asyncio.sleep(rng.uniform(0.2, 1.5))
            tiers.kill(service)
            tally.kills[service] += 1
            await asyncio.to_thread(tiers.start, service)


def _distinct(texts: Sequence[Sequence[int]]) -> float:
    """Different runs of RUN tokens among all such runs."""
    runs = Counter(tuple(text[at : at + RUN]) for text in texts for at in range(len(text) - RUN + 1))
    return len(runs) / max(1, runs.total())


if __name__ == "__main__":
    main()
