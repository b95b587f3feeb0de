from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.processes import Processes, Service
from tests.tiers import MEMORY, engine
from tests.wire import Peer, decoded
from trifold.cloud.core.engines.engine import Part
from trifold.cloud.core.service import CoreService
from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.cli.service_process import ServiceProcess
from trifold.shared.errors import Unavailable
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.session.server import serve

TOKENS = np.arange(8)


def digest(bundle: Path) -> str:
    return TierFolder.open(bundle, "edge").manifest.serving_digest


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What `trifold ARGUMENTS` says and ends with."""
    words = [sys.executable, "-m", "trifold.shared.cli.main", *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


async def refused(peer: Peer, bundle: Path) -> None:
    """Waits until the service has heard that it is to stop, and asks for a session."""
    while not (await peer.describe()).draining:
        pass
    with pytest.raises(Unavailable, match="shutting down"):
        await peer.call().open(digest(bundle))


async def ended(tiers: Processes, service: Service) -> int:
    """Waits until a service has ended by itself; its exit code."""
    await asyncio.to_thread(os.waitid, os.P_PID, tiers.pid(service), os.WEXITED | os.WNOWAIT)
    return tiers.stop(service)


def test_a_service_tells_how_far_it_is_and_ends_in_order_on_sigterm(bundle: Path) -> None:
    with ServiceProcess(["cloud", "serve", str(bundle), "--listen", "127.0.0.1:0"]) as core:
        assert core.address.startswith("127.0.0.1:")
        assert "loading the cloud shard" in core.log()
        assert "exact" in core.log()
        assert core.terminate() == 0
        assert "Traceback" not in core.log()


async def test_sigterm_lets_a_session_end_and_admits_no_other(bundle: Path) -> None:
    with Processes(bundle, "--grace", "60") as tiers:
        async with Peer.at(tiers.edge, "EdgeService") as peer:
            talk = peer.call()
            await talk.open(digest(bundle))
            await talk.send_tokens(TOKENS[:4], 0)
            await talk.result()
            for service in ("edge", "cloud"):
                os.kill(tiers.pid(service), signal.SIGTERM)
            await refused(peer, bundle)
            await talk.send_tokens(TOKENS[4:], 4)
            assert (await talk.result()).header.rows == 4
            await talk.close()
        assert await ended(tiers, "edge") == 0
        assert await ended(tiers, "cloud") == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_stops_at_once_and_the_session_is_told_to_resume(
    bundle: Path, number: signal.Signals
) -> None:
    with Processes(bundle, "--grace", "600") as tiers:
        async with Peer.at(tiers.edge, "EdgeService") as peer:
            talk = peer.call()
            await talk.open(digest(bundle))
            await talk.send_tokens(TOKENS, 0)
            await talk.result()
            os.kill(tiers.pid("edge"), signal.SIGTERM)
            await refused(peer, bundle)
            os.kill(tiers.pid("edge"), number)
            error = await talk.end()
            assert type(error) is Unavailable
            assert "resume" in error.message
        assert await ended(tiers, "edge") == 0


def stopped_in_a_turn_without_end(bundle: Path, grace: float, signals: int) -> None:
    """A process of its own: a core that gets so many signals while its engine is busy for ever."""
    core, busy = engine(bundle), threading.Event()
    rows = np.zeros((8, core.hidden), np.float32)

    def turn() -> None:
        while True:
            core.run([Part(core.cache(8), rows, 0)])
            busy.set()

    async def run() -> None:
        manifest = TierFolder.open(bundle, "cloud").manifest
        service = CoreService(core, manifest, memory=MEMORY, streams=64, lease=30.0)
        with service.table.seat(pb.Open(session=b"never closed", epoch=1, capacity=8)) as seat:
            running = service.scheduler.run(seat, turn)
            serving = asyncio.create_task(serve(service, "127.0.0.1:0", grace=grace))
            await asyncio.to_thread(busy.wait)
            for number in range(signals):
                os.kill(os.getpid(), signal.SIGTERM)
                while number == 0 and not service.table.draining:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await asyncio.gather(serving, running, return_exceptions=True)

    asyncio.run(run())


@pytest.mark.parametrize(("grace", "signals"), [(0.1, 1), (600.0, 2)])
def test_a_service_stops_in_the_middle_of_a_turn_when_the_grace_is_over_or_at_a_second_signal(
    bundle: Path, grace: float, signals: int
) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=stopped_in_a_turn_without_end, args=(bundle, grace, signals))
    process.start()
    process.join(60)
    code = process.exitcode
    process.kill()
    process.join()
    assert code == 0


async def test_a_session_goes_on_after_the_core_was_killed_and_started_again(bundle: Path) -> None:
    with Processes(bundle) as tiers:
        async with Peer.at(tiers.edge, "EdgeService") as peer:
            talk = peer.call()
            await talk.open(digest(bundle))
            await talk.send_tokens(TOKENS, 0)
            rows = (await talk.result()).rows
            tiers.kill("cloud")
            assert type(await talk.end()) is Unavailable
            await asyncio.to_thread(tiers.start, "cloud")
            again = peer.call()
            assert (await again.open(digest(bundle), session=talk.session, epoch=2)).have == 0
            await again.send_tokens(TOKENS, 0)
            assert (await again.result()).rows == rows
            await again.close()


async def test_a_session_goes_on_after_the_edge_was_killed_and_started_again(bundle: Path) -> None:
    with Processes(bundle) as tiers:
        async with Peer.at(tiers.edge, "EdgeService") as peer:
            talk = peer.call()
            await talk.open(digest(bundle))
            await talk.send_tokens(TOKENS, 0)
            await talk.result()
            tiers.kill("edge")
            assert type(await talk.end()) is Unavailable
            await asyncio.to_thread(tiers.start, "edge")
            again = peer.call()
            assert (await again.open(digest(bundle), session=talk.session, epoch=2)).have == 0
            await again.send_tokens(TOKENS, 0)
            result = await again.result()
            manifest = TierFolder.open(bundle, "edge").manifest
            codec = RowCodec(manifest.serving.codec, manifest.serving.spec.hidden)
            assert decoded(codec, result).shape == (8, codec.hidden)
            assert (await peer.describe()).sessions == 1
            await again.close()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--listen", "0.0.0.0:0"], 78, "not on loopback"),
        (["--listen", "127.0.0.1:99999"], 78, "is not HOST:PORT"),
        (["--kv-memory", "much"], 78, "--kv-memory"),
    ],
)
def test_a_setting_that_cannot_be_used_is_told_without_a_traceback(
    bundle: Path, arguments: list[str], code: int, said: str
) -> None:
    result = command("cloud", "serve", str(bundle), *arguments)
    assert result.returncode == code
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_damaged_bundle_is_refused_by_file_name(bundle: Path, tmp_path: Path) -> None:
    result = command("edge", "serve", str(tmp_path))
    assert result.returncode == 66
    assert "manifest.json" in result.stderr


def test_a_port_that_another_service_has_is_told(bundle: Path) -> None:
    with ServiceProcess(["cloud", "serve", str(bundle), "--listen", "127.0.0.1:0"]) as core:
        result = command("cloud", "serve", str(bundle), "--listen", core.address)
        assert result.returncode == 78
        assert "is another service there" in result.stderr
