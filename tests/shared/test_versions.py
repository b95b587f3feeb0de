"""The versions of a running tier: promotions noticed, shards loaded once, and freed when unused."""

from __future__ import annotations

import asyncio
import gc
import logging
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.adapters import random_factors
from trifold.cloud.adapter.build import add_version
from trifold.cloud.split.split import split
from trifold.shared.bundle.adapter import Origin
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import Cuts
from trifold.shared.bundle.store import promote, rollback
from trifold.shared.errors import DamagedFile, DigestMismatch, NotExact, Overloaded
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.runtime.shard import Shard
from trifold.shared.runtime.versions import MOST_VERSIONS, ShardVersions


@pytest.fixture(scope="module")
def made(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A bundle and versions of it: with the bundle's own, one more than there is room for."""
    out = tmp_path_factory.mktemp("versions") / "bundle"
    split(Checkpoint.open(checkpoint), Cuts(edge=1, cloud=3), out, train=True)
    factors = [random_factors(checkpoint, out, seed=seed) for seed in range(MOST_VERSIONS)]
    return out, [add_version(out, each, Origin(producer="tests")) for each in factors]


@pytest.fixture
def bundle(made: tuple[Path, list[str]], tmp_path: Path) -> Path:
    return shutil.copytree(made[0], tmp_path / "bundle")


@pytest.fixture
def digests(made: tuple[Path, list[str]]) -> list[str]:
    return made[1]


@pytest.fixture
def versions(bundle: Path) -> ShardVersions:
    folder = TierFolder.open(bundle, "edge")
    return ShardVersions(Shard.load(folder, threads=1), folder, threads=1)


def test_what_is_promoted_is_in_force_after_a_refresh_and_what_is_rolled_back_no_more(
    bundle: Path, digests: list[str], versions: ShardVersions
) -> None:
    versions.refresh()
    assert (versions.current.digest, versions.current.shard) == ("", versions.base)
    seen = set()
    for digest in digests[:2]:
        promote(bundle, digest)
        assert versions.current.digest != digest
        versions.refresh()
        assert versions.current.digest == digest
        seen.add(versions.current.shard.fingerprint)
    assert len(seen - {versions.base.fingerprint}) == 2
    rollback(bundle)
    versions.refresh()
    assert versions.current.digest == digests[0]
    rollback(bundle)
    versions.refresh()
    assert versions.current.shard is versions.base


def test_versions_compute_other_rows_in_caches_that_any_of_them_made(
    digests: list[str], versions: ShardVersions
) -> None:
    tokens = np.arange(20)
    base, one, two = versions.base, *map(versions.load, digests[:2])
    rows = [shard.run(base.cache(20), tokens, 0) for shard in (base, one, two)]
    assert not any(np.array_equal(rows[a], rows[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert np.array_equal(one.run(one.cache(20), tokens, 0), rows[1])


async def test_a_version_is_loaded_once_however_many_ask_and_freed_when_nobody_holds_it(
    bundle: Path, digests: list[str], versions: ShardVersions
) -> None:
    promote(bundle, digests[0])
    first, *others = await asyncio.gather(*(versions.get(digests[0]) for _ in range(8)))
    assert all(shard is first for shard in others)
    assert await versions.get("") is versions.base
    held = weakref.ref(first)
    del first, others
    await until(lambda: gone(held))  # the loop and the thread that loaded it let go a moment later
    versions.refresh()
    held = weakref.ref(versions.current.shard)
    session = versions.current.shard
    promote(bundle, digests[1])
    versions.refresh()
    assert not gone(held)
    assert session is await versions.get(digests[0])
    del session
    await until(lambda: gone(held))


def gone(shard: weakref.ref[Shard]) -> bool:
    gc.collect()
    return shard() is None


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - a promotion has no event for a test
            await asyncio.sleep(0.01)


async def test_a_damaged_version_is_told_and_changes_nothing_until_it_is_repaired(
    bundle: Path, digests: list[str], versions: ShardVersions, caplog: pytest.LogCaptureFixture
) -> None:
    following = asyncio.create_task(versions.follow())
    promote(bundle, digests[0])
    await until(lambda: versions.current.digest == digests[0])
    promote(bundle, digests[1])
    weights = bundle / "edge" / "adapters" / digests[1] / "weights.bin"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with caplog.at_level(logging.ERROR):
        await until(lambda: f"{digests[1]}/weights.bin" in caplog.text)
    assert f"keep adapter version {digests[0][:12]}" in caplog.text
    assert versions.current.digest == digests[0]
    with pytest.raises(DamagedFile, match=r"weights\.bin"):
        await versions.get(digests[1])
    weights.write_bytes(good)
    promote(bundle, digests[1])
    await until(lambda: versions.current.digest == digests[1])
    assert not following.done()
    following.cancel()


async def test_a_version_that_is_not_here_is_refused(versions: ShardVersions) -> None:
    for digest in ("ab" * 32, "../../edge", "current"):
        with pytest.raises(DigestMismatch, match="the edge has no promoted adapter version"):
            await versions.get(digest)
        with pytest.raises(DigestMismatch, match="the edge has no adapter version"):
            versions.load(digest)


async def test_a_peer_gets_what_was_ever_promoted_and_nothing_that_was_only_added(
    bundle: Path, digests: list[str], versions: ShardVersions
) -> None:
    for digest in digests[:2]:
        with pytest.raises(DigestMismatch, match=f"no promoted adapter version '{digest[:12]}'"):
            await versions.get(digest)
    promote(bundle, digests[0])
    assert (await versions.get(digests[0])).exact
    rollback(bundle)
    versions.refresh()
    promote(bundle, digests[1])
    assert (await versions.get(digests[0])).exact


async def test_peers_cannot_have_more_versions_loaded_than_there_is_room_for(
    bundle: Path, digests: list[str], versions: ShardVersions
) -> None:
    for digest in digests:
        promote(bundle, digest)
    promote(bundle, "")
    *older, last = digests
    held = await asyncio.gather(*map(versions.get, older))
    assert len(held) + 1 == MOST_VERSIONS
    with pytest.raises(Overloaded, match=f"no room for adapter version {last[:12]}") as refusal:
        await versions.get(last)
    assert refusal.value.retry_after
    assert await versions.get(older[0]) is held[0]
    circle: list[object] = [held.pop()]
    circle.append(circle)
    del circle  # garbage takes no room
    assert (await versions.get(last)).exact
    promote(bundle, last)
    current = await versions.get(last)  # ahead of refresh()
    versions.refresh()
    assert versions.current.shard is current
    promote(bundle, "")
    versions.refresh()
    del current, held
    await until(lambda: len(versions._loaded) == 1)
    assert (await versions.get(last)).exact


def test_a_version_whose_self_test_fails_is_refused_unless_that_is_allowed(
    bundle: Path, digests: list[str], versions: ShardVersions, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Shard.load

    def fail(folder: TierFolder, *, threads: int = 0) -> Shard:
        shard = load(folder, threads=threads)
        shard.exact = False
        return shard

    monkeypatch.setattr(Shard, "load", fail)
    with pytest.raises(NotExact, match=digests[0][:12]):
        versions.load(digests[0])
    allowed = ShardVersions(versions.base, TierFolder.open(bundle, "edge"), inexact=True)
    assert not allowed.load(digests[0]).exact
