"""The split over loopback against the monolith, and what three processes and bare gRPC cost without it."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tests.bench import relay
from tests.bench.nano import held_out, split_nano, tokenizer
from tests.bench.pipes import Pipes
from tests.bench.shapes import SHAPES
from tests.checkpoints import generate
from tests.processes import Processes
from trifold.cloud.split.plan import plan
from trifold.cloud.split.split import split
from trifold.device import Client, Sampling
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.runtime.monolith import Monolith

TURNS: Final = 7
TOKENS: Final = 128


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder:
        root = Path(folder)
        print("| shape | threads | monolith, ms a token | over pipes | bare gRPC | split | added | ratio |")
        print("|---|---|---|---|---|---|---|---|")
        _compare("trifold-nano", split_nano(root / "nano"), threads=1)
        for name, config in SHAPES.items():
            checkpoint = Checkpoint.open(generate(config, root / name))
            split(checkpoint, plan(checkpoint.spec).cuts, root / f"{name}-bundle")
            _compare(name, root / f"{name}-bundle", threads=2)


def _compare(name: str, bundle: Path, *, threads: int) -> None:
    """Everything in turn, several times over; medians of the turns are compared."""
    prompt = [token % 16000 for token in tokenizer().encode(held_out()[:400]).ids]
    monolith = Monolith.load(bundle, threads=threads)
    turns: dict[str, list[float]] = {"monolith": [], "pipes": [], "grpc": [], "split": []}
    with (
        Pipes(bundle, threads) as pipes,
        Processes(bundle, "--threads", str(threads)) as tiers,
        Client(tiers.edge, bundle=bundle, threads=threads) as client,
    ):
        for _ in range(TURNS):
            turns["monolith"].append(_step(monolith.generate(prompt, Sampling(), TOKENS, eos=())))
            turns["split"].append(_step(client.generate(prompt, max_tokens=TOKENS, eos=())))
            turns["pipes"].append(pipes.step(TOKENS))
            turns["grpc"].append(relay.measure(turns["monolith"][-1] / 1000))
    one, apart, links, three = (statistics.median(times) for times in turns.values())
    figures = [f"{one:.2f}", f"{apart:.2f}", f"{links:.2f}", f"{three:.2f}", f"{three - one:+.2f}"]
    print(f"| {name} | {threads} | {' | '.join(figures)} | {one / three:.2f} |", flush=True)


def _step(tokens: Iterable[object]) -> float:
    """Mean milliseconds from one token to the next."""
    times = [time.perf_counter() for _ in tokens]
    return 1000 * (times[-1] - times[0]) / (len(times) - 1)
