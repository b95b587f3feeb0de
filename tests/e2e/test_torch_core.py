"""`trifold cloud serve --engine torch` between real tiers, alone and with many sessions at once."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.processes import Processes
from trifold.cloud.core.engines.alone import Alone
from trifold.cloud.core.engines.torch.engine import TorchEngine
from trifold.cloud.split.split import split
from trifold.device import AsyncClient, Chunk, Sampling
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import Cuts
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.runtime.monolith import Monolith

PROMPT = [int(byte) for byte in b"Somewhere a core computes for all of them." * 3]
TOKENS = 40


def torch_core(folder: TierFolder) -> Alone:
    return Alone(TorchEngine.load(folder, memory=64 << 20, threads=1))


@pytest.fixture(scope="module")
def torch_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "floats"
    split(Checkpoint.open(checkpoint), Cuts(edge=1, cloud=3), out, train=True)
    return out


@pytest.fixture(scope="module")
def tiers(torch_bundle: Path) -> Iterator[Processes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIFOLD_CLOUD_ENGINE", "torch")
        with Processes(torch_bundle, "--grace", "0.2", "--threads", "1") as running:
            yield running


@pytest.fixture(scope="module")
def monolith(torch_bundle: Path) -> Monolith:
    """The model in one process, with this core."""
    return Monolith.load(torch_bundle, threads=1, core=torch_core)


async def complete(client: AsyncClient, prompt: Sequence[int], sampling: Sampling) -> list[Chunk]:
    generation = client.generate(
        prompt, max_tokens=TOKENS, temperature=sampling.temperature, seed=sampling.seed, eos=()
    )
    return [chunk async for chunk in generation]


def check(chunks: list[Chunk], monolith: Monolith, prompt: Sequence[int], sampling: Sampling) -> None:
    """The tokens and rows of the model in one process, which computes a prompt in one call."""
    tokens = [*monolith.generate(prompt, sampling, TOKENS, eos=())]
    assert [token for chunk in chunks for token in chunk.token_ids] == [token.id for token in tokens]
    digests = {token.position: token.row_digest for token in tokens}
    traces = [chunk.trace for chunk in chunks if chunk.trace]
    assert traces
    assert all(trace.row_digest == digests[trace.position] for trace in traces)


async def test_a_core_on_torch_gives_the_tokens_of_the_model_in_one_process(
    tiers: Processes, monolith: Monolith
) -> None:
    sampling = Sampling(temperature=1.0, seed=7)
    async with AsyncClient(tiers.edge, bundle=tiers.bundle) as client:
        chunks = await complete(client, PROMPT, sampling)
    check(chunks, monolith, PROMPT, sampling)
    assert len({token for chunk in chunks for token in chunk.token_ids}) > TOKENS / 4
    log = tiers.log("cloud")
    assert ": exact, torch-" in log
    assert "/cpu-bf16/" in log


async def test_many_sessions_at_once_get_the_tokens_that_each_gets_alone(
    tiers: Processes, monolith: Monolith
) -> None:
    prompts = [PROMPT[: 1 + 7 * number] for number in range(16)]
    samplings = [Sampling(temperature=1.0, seed=number) for number in range(16)]
    async with AsyncClient(tiers.edge, bundle=tiers.bundle, chunk=16) as client:
        results = await asyncio.gather(
            *(complete(client, prompt, one) for prompt, one in zip(prompts, samplings, strict=True))
        )
        description = await client.describe()
    for prompt, sampling, chunks in zip(prompts, samplings, results, strict=True):
        check(chunks, monolith, prompt, sampling)
    assert (description.sessions, description.kv_bytes) == (0, 0)


def test_verify_measures_the_engine_that_would_serve(
    torch_bundle: Path, checkpoint: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Somewhere a core computes for all of them, and somebody looks whether it does so well.")
    found = {}
    for engine in ("onnxruntime", "torch"):
        command = ["verify", str(torch_bundle), "--against", str(checkpoint), "--text", str(text)]
        done = subprocess.run(
            [sys.executable, "-m", "trifold.shared.cli.main", *command, "--engine", engine, "--json"],
            capture_output=True,
            text=True,
            check=True,
        )
        found[engine] = json.loads(done.stdout)
    assert found["torch"]["tokens"] == found["onnxruntime"]["tokens"] > 10
    assert found["torch"]["kl_weights"] != found["onnxruntime"]["kl_weights"]
    assert found["torch"]["kl_weights"] < 0.01
