"""Adapter versions go live in running tiers: sessions go on as they were, the next one is adapted."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.adapters import random_factors
from tests.processes import Processes
from tests.wire import Peer
from trifold.cloud.adapter.build import add_version
from trifold.cloud.split.split import split
from trifold.device import AsyncClient, Client
from trifold.device.client.generation import Generation
from trifold.device.client.journal import Journal
from trifold.shared.bundle.adapter import Origin
from trifold.shared.bundle.manifest import Cuts
from trifold.shared.bundle.store import promote, rollback, stores
from trifold.shared.errors import DamagedFile, DigestMismatch
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.runtime.monolith import Monolith
from trifold.shared.runtime.sampling import Sampling

PROMPT = [int(byte) for byte in b"The same question, before and after."]
TOKENS = 120
SESSIONS = 8


class House:
    """Edge and cloud as processes, and a client, all of one bundle that has one adapter version."""

    def __init__(self, bundle: Path, adapter: str, tiers: Processes, client: AsyncClient) -> None:
        self.bundle = bundle
        self.adapter = adapter
        self.tiers = tiers
        self.client = client

    def generation(self, seed: int, journal: Path | None = None) -> Generation:
        return self.client.generate(
            PROMPT, max_tokens=TOKENS, temperature=1.0, seed=seed, eos=(), journal=journal
        )

    def expected(self, adapter: str, seed: int) -> list[int]:
        monolith = Monolith.load(self.bundle, adapter=adapter, threads=1)
        return [token.id for token in monolith.generate(PROMPT, Sampling(1.0, seed=seed), TOKENS, eos=())]

    async def in_force(self, digest: str) -> None:
        """Waits until device and edge have noticed."""
        async with asyncio.timeout(30):
            while {self.client.adapter, (await self.client.describe()).adapter_digest} != {digest}:  # noqa: ASYNC110
                await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def made(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Of both kinds of device, a bundle and the digest of a version in it."""
    bundles = {}
    for kind, cuts in (("head", Cuts(edge=1, cloud=4)), ("attending", Cuts(edge=1, cloud=3))):
        out = tmp_path_factory.mktemp("adapters") / kind
        split(Checkpoint.open(checkpoint), cuts, out, train=True)
        factors = random_factors(checkpoint, out)
        bundles[kind] = out, add_version(out, factors, Origin(producer="tests"))
    return bundles


@pytest.fixture(params=["head", "attending"])
async def house(
    made: dict[str, tuple[Path, str]], request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[House]:
    original, adapter = made[request.param]
    bundle = shutil.copytree(original, tmp_path / "bundle")
    with Processes(bundle, "--grace", "0.2") as tiers:
        async with AsyncClient(tiers.edge, bundle=bundle, threads=1) as client:
            yield House(bundle, adapter, tiers, client)


async def tokens_of(generation: Generation) -> list[int]:
    return [token async for chunk in generation for token in chunk.token_ids]


async def test_promotion_and_rollback_under_streaming_sessions_change_only_the_next_one(
    house: House,
) -> None:
    async def stream(seed: int, swapped: asyncio.Event) -> list[int]:
        """Goes slower after a while and does not end before the swap, so that this is noticed on the way."""
        tokens: list[int] = []
        async for chunk in house.generation(seed):
            tokens += chunk.token_ids
            if len(tokens) == SESSIONS:
                begun.release()
            if len(tokens) > TOKENS / 4 and not swapped.is_set():
                await asyncio.sleep(0.1)
            if len(tokens) == TOKENS - 10:
                await swapped.wait()
        return tokens

    async def swap(to: str) -> list[list[int]]:
        swapped = asyncio.Event()
        running = [asyncio.create_task(stream(seed, swapped)) for seed in range(SESSIONS)]
        for _ in running:
            await begun.acquire()
        if to:
            await asyncio.to_thread(promote, house.bundle, to)
        else:
            await asyncio.to_thread(rollback, house.bundle)
        await house.in_force(to)
        assert not any(task.done() for task in running)
        swapped.set()
        assert await tokens_of(house.generation(99)) == adapted[99 if to else -99]
        return await asyncio.gather(*running)

    begun = asyncio.Semaphore(0)
    base = [house.expected("", seed) for seed in range(SESSIONS)]
    tuned = [house.expected(house.adapter, seed) for seed in range(SESSIONS)]
    adapted = {99: house.expected(house.adapter, 99), -99: house.expected("", 99)}
    assert adapted[99] != adapted[-99]
    assert await swap(house.adapter) == base
    assert await swap("") == tuned
    description = await house.client.describe()
    assert (description.sessions, description.kv_bytes) == (0, 0)


async def test_a_session_is_resumed_on_its_own_version_by_whoever_comes_later(
    house: House, tmp_path: Path
) -> None:
    """The edge that is killed and the device that comes anew have both never seen the version in use."""
    for number, (before, after) in enumerate((("", house.adapter), (house.adapter, ""))):
        promote(house.bundle, before)
        await house.in_force(before)
        journal = tmp_path / f"journal {number}"
        generation = house.generation(7, journal)
        for _ in range(10):
            await anext(generation)
        promote(house.bundle, after)
        await asyncio.to_thread(house.tiers.kill, "edge")
        await asyncio.to_thread(house.tiers.start, "edge")
        await house.in_force(after)
        wanted = house.expected(before, 7)
        assert [token for _ in range(20) for token in (await anext(generation)).token_ids] == wanted[10:30]
        await generation.aclose()
        async with AsyncClient(house.tiers.edge, bundle=house.bundle, threads=1) as later:
            assert later.adapter == after
            assert await tokens_of(later.resume(journal)) == wanted
            assert await tokens_of(later.generate(PROMPT, max_tokens=5, eos=())) != wanted[:5]
        opened = Journal.open(journal)
        assert opened.request.adapter_digest == before
        opened.close()


async def test_a_session_on_a_version_that_was_taken_back_is_resumed_by_an_edge_that_never_had_it(
    house: House,
) -> None:
    promote(house.bundle, house.adapter)
    await house.in_force(house.adapter)
    generation = house.generation(7)
    begun = [token for _ in range(10) for token in (await anext(generation)).token_ids]
    rollback(house.bundle)
    await asyncio.to_thread(house.tiers.kill, "edge")
    await asyncio.to_thread(house.tiers.start, "edge")
    assert begun + await tokens_of(generation) == house.expected(house.adapter, 7)


async def test_a_session_cannot_change_its_version_nor_begin_on_one_that_was_never_promoted(
    house: House,
) -> None:
    digest = house.client._folder.manifest.serving_digest
    async with Peer.at(house.tiers.edge, "EdgeService") as peer:
        for unknown in ("ab" * 32, "../../../edge", "current", "x", house.adapter):
            with pytest.raises(DigestMismatch, match="the edge has no promoted adapter version"):
                await peer.call().open(digest, adapter_digest=unknown)
        talk = peer.call()
        base = await talk.open(digest)
        await talk.send_tokens(PROMPT, 0)
        await talk.result()
        with pytest.raises(DigestMismatch, match="began on another adapter version"):
            await peer.call().open(digest, session=talk.session, epoch=2, adapter_digest=house.adapter)
        promote(house.bundle, house.adapter)
        adapted = await peer.call().open(digest, adapter_digest=house.adapter)
        fingerprints = [opened.tiers[0].fingerprint for opened in (base, adapted)]
        assert fingerprints[0] != fingerprints[1]


async def test_a_version_that_is_damaged_on_the_edge_is_refused_there_by_file_name(house: House) -> None:
    weights = house.bundle / "edge" / "adapters" / house.adapter / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    promote(house.bundle / "device", house.adapter)
    stores(house.bundle / "edge")[0].write([house.adapter])  # as a copy would that nobody has checked
    async with AsyncClient(house.tiers.edge, bundle=house.bundle, threads=1) as client:
        with pytest.raises(DamagedFile, match=r"weights\.bin"):
            await tokens_of(client.generate(PROMPT, max_tokens=5))


async def test_tiers_do_not_come_up_without_the_version_that_is_promoted(house: House) -> None:
    promote(house.bundle, house.adapter)
    for tier in ("edge", "device"):
        os.truncate(house.bundle / tier / "adapters" / house.adapter / "adapter.json", 100)
    with pytest.raises(DamagedFile, match=rf"device/adapters/{house.adapter}/adapter\.json"):
        AsyncClient(house.tiers.edge, bundle=house.bundle, threads=1)
    serve = ["-m", "trifold.shared.cli.main", "edge", "serve", str(house.bundle), "--listen", "127.0.0.1:0"]
    edge = await asyncio.create_subprocess_exec(sys.executable, *serve, stderr=asyncio.subprocess.PIPE)
    _, said = await edge.communicate()
    assert edge.returncode == DamagedFile.exit_code
    assert f"edge/adapters/{house.adapter}/adapter.json" in said.decode()


def test_a_program_without_an_event_loop_gets_new_versions_too(made: dict[str, tuple[Path, str]]) -> None:
    bundle, adapter = made["attending"]
    with Processes(bundle) as tiers:
        promote(bundle, adapter)
        with Client(tiers.edge, bundle=bundle, threads=1) as client:
            assert client.adapter == adapter
            chunks = client.generate(PROMPT, max_tokens=20, eos=())
            tokens = [token for chunk in chunks for token in chunk.token_ids]
        rollback(bundle)
    monolith = Monolith.load(bundle, adapter=adapter, threads=1)
    assert tokens == [token.id for token in monolith.generate(PROMPT, Sampling(), 20, eos=())]
