"""Certificates that are renewed, run out or are revoked under running streams; tiers are processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from tests.identities import HOST, enrolled, pair
from tests.processes import Processes
from tests.shared.sites import train_bundle
from tests.training_process import TrainingProcess
from tests.wire import Peer
from trifold.cloud.authority.authority import Authority
from trifold.cloud.authority.service import AuthorityServer
from trifold.device.client.async_client import AsyncClient
from trifold.edge.federation.core import RemoteCore
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.errors import Forbidden, Unauthenticated, Unavailable
from trifold.shared.identity.node import Node

TOKENS = list(range(1, 9))
LIFE = 10.0
WITHIN = 60.0
"""Seconds in which a revocation ends open streams, as docs/security.md promises."""


@asynccontextmanager
async def running_authority(folder: Path, life: float = 86_400.0) -> AsyncIterator[AuthorityServer]:
    Authority.init(folder, [HOST])
    server = AuthorityServer(Authority(folder, timedelta(seconds=life)), f"{HOST}:0", f"{HOST}:0")
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


class Site:
    """A core and an edge with TLS, and the folder of a device."""

    def __init__(self, bundle: Path, server: AuthorityServer, folder: Path) -> None:
        authority, address = server.authority, server.renewal
        self.digest = TierFolder.open(bundle, "edge").manifest.serving_digest
        self.core = enrolled(authority, folder / "core", "core", address=address)
        self.edge = enrolled(authority, folder / "edge", "edge", address=address)
        self.device = enrolled(authority, folder / "device", "device", address=address)
        self._bundle = bundle

    @asynccontextmanager
    async def up(self) -> AsyncIterator[Processes]:
        """Its tiers, started and stopped beside the authority, which is in this process."""
        tiers = Processes(self._bundle, tls={"cloud": self.core, "edge": self.edge})
        await asyncio.to_thread(tiers.__enter__)
        try:
            yield tiers
        finally:
            await asyncio.to_thread(tiers.__exit__, None, None, None)


async def test_certificates_are_renewed_under_a_running_stream_which_ends_with_its_own_and_is_resumed(
    bundle: Path, tmp_path: Path
) -> None:
    async with running_authority(tmp_path / "authority", LIFE) as server:
        site = Site(bundle, server, tmp_path)
        first = {node: pair(node).chain for node in (site.core, site.edge, site.device)}

        def renewed() -> bool:
            return all(pair(node).chain != chain for node, chain in first.items())

        async with (
            site.up() as tiers,
            AsyncClient(tiers.edge, bundle=bundle, tls=site.device, threads=1) as client,
            Peer.at(tiers.edge, "EdgeService", site.device) as peer,
        ):
            ends = Node(site.device).papers.certificate.not_valid_after_utc.timestamp()
            talk, position, texts = peer.call(), 0, []
            await talk.open(site.digest)
            while not renewed() or time.time() < ends - LIFE / 5:
                await talk.send_tokens(TOKENS[:1], position)
                assert (await talk.result()).header.rows == 1
                position += 1
                texts.append([c.token_ids async for c in client.generate(TOKENS, max_tokens=4, eos=())])
                await asyncio.sleep(LIFE / 50)
            assert type(await talk.end()) is Unavailable
            async with Peer.at(tiers.edge, "EdgeService", site.device) as anew:
                again = anew.call()
                assert (await again.open(site.digest, session=talk.session, epoch=2)).have == position
                await again.close()
            texts.append([c.token_ids async for c in client.generate(TOKENS, max_tokens=4, eos=())])
            assert len(texts) > 2
            assert all(text == texts[0] for text in texts)


@pytest.mark.parametrize("whose", ["device", "edge"])
async def test_a_revocation_ends_open_streams_within_a_minute_and_lets_nobody_in_again(
    whose: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running_authority(tmp_path / "authority") as server:
        site = Site(bundle, server, tmp_path)
        async with site.up() as tiers, Peer.at(tiers.edge, "EdgeService", site.device) as peer:
            talk = peer.call()
            await talk.open(site.digest)
            await talk.send_tokens(TOKENS, 0)
            await talk.result()
            server.authority.register.revoke(whose)
            began = time.monotonic()
            error = await talk.end()
            seconds = time.monotonic() - began
            assert type(error) is Unauthenticated
            assert f"/{whose}/{whose} was revoked" in error.message
            assert seconds < WITHIN
            with pytest.raises(Unauthenticated, match="was revoked"):
                await peer.call().open(site.digest)
    with capsys.disabled():
        print(f"\nrevocation of the {whose}: its open stream ended after {seconds:.1f} s")


def test_a_site_trains_over_tls_and_nobody_else_does(tmp_path: Path) -> None:
    _, bundle = train_bundle("deepseek_v3", tmp_path)
    authority = Authority.init(tmp_path / "authority", [HOST])
    core = enrolled(authority, tmp_path / "core", "core")
    trainer = enrolled(authority, tmp_path / "trainer", "trainer")
    device = enrolled(authority, tmp_path / "device", "device")
    manifest = TierFolder.open(bundle, "edge").manifest
    rows = np.zeros((1, 8, manifest.serving.spec.hidden), np.float32)
    with TrainingProcess(bundle, "--tls", str(core)) as training:
        with RemoteCore(training.address, manifest, tls=trainer) as remote:
            batch, out = remote.forward(rows, keep=True)
            assert remote.backward(batch, out).shape == rows.shape
        with RemoteCore(training.address, manifest, tls=device) as remote, pytest.raises(Forbidden):
            remote.forward(rows, keep=True)
