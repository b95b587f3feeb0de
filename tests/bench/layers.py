"""The core's layers, timed in a process of their own: `python -m tests.bench.layers ENGINE BUNDLE`.

Prints milliseconds of a step in which each of so many sessions has one row behind CONTEXT positions, on
THREADS threads. transformers has a cache with as many sequences; ours has a cache for each.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from tests.bench.nano import CHECKPOINT
from trifold.shared.bundle.folder import TierFolder

CONTEXT: Final = 64
SESSIONS: Final = (1, 4, 16)
THREADS: Final = 2
STEPS: Final = 60

Start = Callable[[int], Callable[[], object]]
"""Makes so many sessions; what it returns computes a step."""


def trifold(bundle: Path) -> Start:
    from trifold.cloud.core.engines.engine import Part
    from trifold.cloud.core.engines.onnxruntime.engine import OnnxRuntimeEngine

    engine = OnnxRuntimeEngine.load(TierFolder.open(bundle, "cloud"), threads=THREADS)
    rows = np.random.default_rng(0).standard_normal((CONTEXT + 1, engine.hidden), np.float32)

    def start(sessions: int) -> Callable[[], object]:
        caches = [engine.cache(CONTEXT + 1) for _ in range(sessions)]
        for cache in caches:
            engine.run([Part(cache, rows[:CONTEXT], 0)])
        batch = [Part(cache, rows[CONTEXT:], CONTEXT) for cache in caches]
        return lambda: engine.run(batch)

    return start


def transformers(bundle: Path) -> Start:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(THREADS)
    serving = TierFolder.open(bundle, "cloud").manifest.serving
    span = serving.cuts.layers("cloud", len(serving.spec.layers))
    whole = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, attn_implementation="eager")
    model = whole.model
    model.layers = model.layers[span.start : span.stop]
    model.config.num_hidden_layers = len(span)
    for index, layer in enumerate(model.layers):
        layer.self_attn.layer_idx = index

    @torch.inference_mode()
    def start(sessions: int) -> Callable[[], object]:
        cache = DynamicCache()
        rows = torch.randn(sessions, CONTEXT + 1, model.config.hidden_size)
        model(inputs_embeds=rows[:, :CONTEXT], past_key_values=cache, use_cache=True)

        @torch.inference_mode()
        def step() -> None:
            model(inputs_embeds=rows[:, CONTEXT:], past_key_values=cache, use_cache=True)
            cache.crop(-1)

        return step

    return start


ENGINES: Final = {"trifold": trifold, "transformers": transformers}


def main() -> None:
    name, bundle = sys.argv[1], Path(sys.argv[2])
    start = ENGINES[name](bundle)
    print(json.dumps({sessions: _milliseconds(start(sessions)) for sessions in SESSIONS}))


def _milliseconds(step: Callable[[], object]) -> float:
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times[STEPS // 4 :])


if __name__ == "__main__":
    main()
