"""Tiers on emulated arm64 processors: an edge between this machine's core and device, and all three."""

from __future__ import annotations

import json
import os
import re
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.arm64.machine import MACHINES, ROOT, Machine
from tests.processes import Processes, Service
from trifold.cloud.split.split import split
from trifold.device import Client
from trifold.shared.bundle.manifest import Cuts
from trifold.shared.cli.service_process import ServiceProcess
from trifold.shared.model.checkpoint import Checkpoint

pytestmark = pytest.mark.skipif(
    "TRIFOLD_TEST_ARM64" not in os.environ, reason="needs an emulated machine: make test-arm64"
)

PROMPT = "import os\n\n\ndef main():\n"
TOKENS = 24
SAMPLINGS = ((0.0, 0), (1.0, 7))
"""Temperature and seed: greedy, and not."""
PATIENCE = 300.0
"""Seconds: an emulated processor is twenty times slower than this one."""

ONE_THREAD = ("--threads", "1")
"""More would wait for each other in busy loops, which cost most where they are emulated."""

Tokens = list[tuple[int, str]]
"""Ids, and the digest of the row that predicted each."""

MONOLITH = """
import json, sys
from pathlib import Path
from trifold.shared.runtime.monolith import Monolith
from trifold.shared.runtime.sampling import Sampling
bundle, prompt, samplings, tokens = json.loads(sys.argv[1])
monolith = Monolith.load(Path(bundle), threads=1)
for temperature, seed in samplings:
    found = monolith.generate(prompt, Sampling(temperature=temperature, seed=seed), tokens, eos=())
    print(json.dumps([[token.id, token.row_digest] for token in found]))
"""
"""A program for an arm64 machine: what one process generates there."""

DEVICE = """
import json, sys
from trifold.device import Client
bundle, edge, prompt, samplings, tokens = json.loads(sys.argv[1])
with Client(edge, bundle=bundle, timeout=300, threads=1) as client:
    for temperature, seed in samplings:
        found = client.generate(prompt, max_tokens=tokens, temperature=temperature, seed=seed, eos=())
        print(json.dumps([[chunk.token_ids[0], chunk.trace.row_digest] for chunk in found]))
"""
"""The same for a device in front of an edge."""


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model, split; its device has an attention layer."""
    out = tmp_path_factory.mktemp("nano")
    split(Checkpoint.open(ROOT / "models" / "trifold-nano"), Cuts(edge=2, cloud=5), out)
    return out


@pytest.fixture(scope="module")
def here(nano: Path) -> Iterator[Processes]:
    """Core and edge on this machine."""
    with Processes(nano) as tiers:
        yield tiers


@pytest.fixture(params=MACHINES, ids=str)
def machine(request: pytest.FixtureRequest) -> Machine:
    found: Machine = request.param
    return found


def prompt_of(bundle: Path) -> list[int]:
    found: list[int] = Tokenizer.from_file(str(bundle / "device" / "tokenizer.json")).encode(PROMPT).ids
    return found


def generated(client: Client, prompt: list[int], lose: Callable[[], object] | None = None) -> list[Tokens]:
    """What this machine's device gets for each sampling; calls `lose` after a third of the first."""
    every: list[Tokens] = []
    for temperature, seed in SAMPLINGS:
        generation = client.generate(prompt, max_tokens=TOKENS, temperature=temperature, seed=seed, eos=())
        tokens: Tokens = []
        for chunk in generation:
            assert chunk.trace
            assert chunk.trace.exact
            tokens.append((chunk.token_ids[0], chunk.trace.row_digest))
            if lose and len(tokens) == TOKENS // 3 and not every:
                lose()
        assert len(tokens) == TOKENS
        every.append(tokens)
    return every


def agreement(one: list[Tokens], other: list[Tokens]) -> str:
    """How many tokens agree until the first that does not; after that the texts are others."""
    found = []
    for here, there in zip(one, other, strict=True):
        pairs = list(zip(here, there, strict=True))
        ids = [mine[0] == theirs[0] for mine, theirs in pairs]
        same = ids.index(False) if False in ids else len(ids)
        found.append(f"{same} of {len(ids)} tokens, {sum(m == t for m, t in pairs)} rows bit for bit")
    return "; ".join(found)


def answered(machine: Machine, program: str, question: list[object]) -> list[Tokens]:
    """What a program prints on an emulated machine: a line of JSON for each sampling."""
    command = [*machine.interpreter, "-c", program, json.dumps(question)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return [[(token, row) for token, row in json.loads(line)] for line in done.stdout.splitlines()]


def edge_fingerprint(client: Client) -> str:
    (found,) = (tier.fingerprint for tier in client.describe().tiers if tier.tier == "edge")
    return found


def test_an_arm64_edge_serves_this_machines_device_through_this_machines_core(
    machine: Machine, here: Processes, nano: Path
) -> None:
    prompt = prompt_of(nano)
    with Client(here.edge, bundle=nano) as client:
        expected, ours = generated(client, prompt), edge_fingerprint(client)
    with Processes(nano, *ONE_THREAD, interpreters={"edge": machine.interpreter}) as tiers:
        with Client(tiers.edge, bundle=nano, timeout=PATIENCE) as client:
            tokens, theirs = generated(client, prompt), edge_fingerprint(client)

            def lose_the_edge() -> None:
                tiers.kill("edge")
                tiers.start("edge")

            assert generated(client, prompt, lose_the_edge) == tokens
        with Client(tiers.edge, bundle=nano, chunk=3) as client:
            assert generated(client, prompt) == tokens
    assert "aarch64" in theirs
    print(f"\n{theirs}\nagainst {ours}: {agreement(expected, tokens)}")


def test_arm64_tiers_give_the_tokens_and_the_rows_of_their_monolith(machine: Machine, nano: Path) -> None:
    question = [prompt_of(nano), SAMPLINGS, TOKENS]
    expected = answered(machine, MONOLITH, [str(nano), *question])
    tiers_there: dict[Service, list[str]] = {"cloud": machine.core.interpreter, "edge": machine.interpreter}
    with Processes(nano, *ONE_THREAD, interpreters=tiers_there) as tiers:
        assert answered(machine, DEVICE, [str(nano), tiers.edge, *question]) == expected
    assert [len(tokens) for tokens in expected] == [TOKENS] * len(SAMPLINGS)


def test_an_arm64_site_answers_openai_clients(here: Processes, nano: Path, tmp_path: Path) -> None:
    (machine,) = (machine for machine in MACHINES if machine.lock == "gateway")
    command = ["device", "serve", str(nano), "--edge", here.edge, "--timeout", str(PATIENCE)]
    addresses = ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--journals", str(tmp_path)]
    site = ServiceProcess(
        [*command, *addresses, *ONE_THREAD], interpreter=machine.interpreter, timeout=PATIENCE
    )
    with site:
        (url,) = re.findall(r"http://\S+/v1", site.log())
        # Greedy, and so never at its end too soon.
        wanted = {"model": "trifold", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
        asked = json.dumps(wanted).encode()
        request = urllib.request.Request(f"{url}/completions", asked, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            usage = json.load(answer)["usage"]
    assert usage["completion_tokens"] == TOKENS
