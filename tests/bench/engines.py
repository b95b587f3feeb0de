"""One engine, timed in a process of its own: `python -m tests.bench.engines NAME MODEL` prints milliseconds.

Prefill is a prompt of PROMPT tokens at once, decode the mean of DECODE single tokens after it, on THREADS
threads. The first round warms up, the best of the others counts: what other work adds is left out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

PROMPT: Final = 128
DECODE: Final = 64
ROUNDS: Final = 4
THREADS: Final = 2

Feed = Callable[[list[int], int], None]
"""Computes the logits after token ids that begin at a position; position 0 begins a new text."""


def monolith(model: Path) -> Feed:
    from trifold.shared.runtime.monolith import Monolith, MonolithSession

    loaded = Monolith.load(model, threads=THREADS)
    session: MonolithSession

    def feed(tokens: list[int], base_pos: int) -> None:
        nonlocal session
        if base_pos == 0:
            session = loaded.session(PROMPT + DECODE)
        session.feed(np.array(tokens), base_pos, base_pos + len(tokens) - 1)

    return feed


def transformers(model: Path) -> Feed:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    cache: Any = None

    @torch.inference_mode()
    def feed(tokens: list[int], base_pos: int) -> None:
        nonlocal cache
        past = cache if base_pos else None
        cache = loaded(torch.tensor([tokens]), past_key_values=past, logits_to_keep=1).past_key_values

    return feed


def llama_cpp(model: Path) -> Feed:
    import llama_cpp as llama

    llama.llama_backend_init()
    loaded = llama.llama_model_load_from_file(str(model).encode(), llama.llama_model_default_params())
    if not loaded:
        sys.exit(f"llama.cpp cannot load {model}")
    options = llama.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = 512
    options.n_threads = options.n_threads_batch = THREADS
    context = llama.llama_init_from_model(loaded, options)

    def feed(tokens: list[int], base_pos: int) -> None:
        if base_pos == 0:
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
        ids = (llama.llama_token * len(tokens))(*tokens)
        if llama.llama_decode(context, llama.llama_batch_get_one(ids, len(tokens))):
            sys.exit("llama_decode failed")
        llama.llama_get_logits(context)

    return feed


ENGINES: Final = {"monolith": monolith, "transformers": transformers, "llama_cpp": llama_cpp}


def main() -> None:
    name, model = sys.argv[1], Path(sys.argv[2])
    feed = ENGINES[name](model)
    prompt = [300 + 7 * index % 1000 for index in range(PROMPT)]
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        feed(prompt, 0)
        prefilled = time.perf_counter()
        for index in range(DECODE):
            feed([400 + index], PROMPT + index)
        rounds.append((prefilled - began, (time.perf_counter() - prefilled) / DECODE))
    prefill, decode = (1000 * min(times) for times in zip(*rounds[1:], strict=True))
    print(json.dumps({"prefill": prefill, "decode": decode}))


if __name__ == "__main__":
    main()
