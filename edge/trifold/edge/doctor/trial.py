"""One execution provider at work: `python -m trifold.edge.doctor.trial PROVIDER THREADS [FOLDER …]`.

The provider list of ONNX Runtime is fixed when it is compiled: whether one works is known when it has. A
process of its own, because a provider whose libraries do not fit may end the process that asks.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from trifold.edge.doctor.tiers import own
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.errors import TrifoldError
from trifold.shared.runtime.engine import PROVIDER, load, placement
from trifold.shared.runtime.monolith import Core
from trifold.shared.runtime.shard import Shard

_PROBE: Final = Path(__file__).with_name("probe.onnx")
"""Made by edge/probe.py."""

_ROWS: Final = 8


@dataclass(frozen=True)
class Trial:
    """A graph that has run: its nodes by provider, and its largest error relative to the largest value."""

    graph: str
    nodes: dict[str, int]
    error: float
    seconds: float


def probe(provider: str, threads: int) -> Trial:
    """The small graph, against NumPy. Raises TrifoldError where the provider does not come up."""
    session = load(_PROBE.read_bytes(), b"", threads=threads, provider=provider)
    if provider not in session.get_providers():
        raise TrifoldError("it does not come up: a library that it needs is missing, or there is no device")
    random = np.random.Generator(np.random.Philox(key=1))
    left, right = (random.standard_normal(value.shape, np.float32) for value in session.get_inputs())
    began = perf_counter()
    [got] = session.run(None, {"left": left, "right": right})
    seconds = perf_counter() - began
    powers = np.exp(left @ right)
    wanted = powers / powers.sum(axis=-1, keepdims=True)
    return Trial("a small graph", placement(session), _difference(got, wanted), seconds)


def run_shard(provider: str, folder: TierFolder, threads: int) -> Trial:
    """A tier's shard, against itself on the CPU."""
    shard = Shard(folder, threads=threads, provider=provider)
    given = inputs_for(shard)
    got, seconds = timed(shard, given)
    wanted = got if provider == PROVIDER else timed(Shard(folder, threads=threads), given)[0]
    return Trial(f"the {folder.tier} shard", shard.placement, _difference(got, wanted), seconds)


def inputs_for(shard: Shard) -> NDArray[Any]:
    """A few tokens, or rows."""
    count = min(_ROWS, shard.spec.max_positions)
    random = np.random.Generator(np.random.Philox(key=2))
    if shard.tier == "edge":
        return random.integers(0, shard.vocab, count)
    return random.standard_normal((count, shard.hidden), np.float32)


def timed(shard: Core, inputs: NDArray[Any]) -> tuple[NDArray[Any], float]:
    """What it gives for them, and in what time."""
    began = perf_counter()
    got = shard.run(shard.cache(len(inputs)), inputs, 0)
    return got, perf_counter() - began


def _difference(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def main() -> None:
    """Prints the trials as JSON; an error ends it with the message on stderr."""
    provider, threads, *folders = sys.argv[1:]
    try:
        trials = [probe(provider, int(threads))]
        trials += [run_shard(provider, own(Path(path))[0], int(threads)) for path in folders]
    except TrifoldError as error:
        sys.exit(error.message)
    print(json.dumps([asdict(trial) for trial in trials]))


if __name__ == "__main__":
    main()
