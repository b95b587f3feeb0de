"""OpenAI's client over HTTP against the SDK, and many of them at once."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

from openai import OpenAI

from tests.bench.nano import split_nano
from tests.processes import Processes
from tests.site import Service
from trifold.device import Client

TOKENS: Final = 128
PROMPT: Final = "import os\n"


class Answer(NamedTuple):
    """Seconds to the first token, tokens, and the text."""

    first: float
    tokens: int
    text: str


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder:
        bundle = split_nano(Path(folder) / "nano")
        with (
            Processes(bundle, "--threads", "1") as tiers,
            Service(tiers, Path(folder) / "journals", "--threads", "1") as service,
            Client(tiers.edge, bundle=bundle, threads=1) as sdk,
            service.openai() as client,
        ):
            print("| clients | through | first token p50, ms | p99 | tokens a second, all | texts as alone |")
            print("|---|---|---|---|---|---|")
            for count in (1, 8, 32):
                _row("the SDK", count, lambda seed: _by_sdk(sdk, seed))
                _row("OpenAI's client", count, lambda seed: _by_openai(client, seed))


def _row(through: str, count: int, answer: Callable[[int], Answer]) -> None:
    alone = [answer(seed).text for seed in range(count)]
    with ThreadPoolExecutor(count) as pool:
        began = time.perf_counter()
        answers = list(pool.map(answer, range(count)))
        seconds = time.perf_counter() - began
    same = sum(answer.text == text for answer, text in zip(answers, alone, strict=True))
    firsts = sorted(answer.first * 1000 for answer in answers)
    p99 = firsts[min(len(firsts) - 1, int(0.99 * len(firsts)))]
    figures = (
        f"{statistics.median(firsts):.0f} | {p99:.0f} | {count * TOKENS / seconds:.0f} | {same} of {count}"
    )
    print(f"| {count} | {through} | {figures} |", flush=True)


def _by_sdk(client: Client, seed: int) -> Answer:
    began = time.perf_counter()
    first, tokens, text = 0.0, 0, ""
    for chunk in client.generate(PROMPT, max_tokens=TOKENS, temperature=1, seed=seed):
        first = first or time.perf_counter() - began
        tokens += len(chunk.token_ids)
        text += chunk.text
    return Answer(first, tokens, text)


def _by_openai(client: OpenAI, seed: int) -> Answer:
    began = time.perf_counter()
    first, tokens, text = 0.0, 0, ""
    stream = client.completions.create(
        model="trifold",
        prompt=PROMPT,
        max_tokens=TOKENS,
        seed=seed,
        stream=True,
        stream_options={"include_usage": True},
    )
    for part in stream:
        first = first or time.perf_counter() - began
        text += "".join(choice.text for choice in part.choices)
        tokens += part.usage.completion_tokens if part.usage else 0
    return Answer(first, tokens, text)
