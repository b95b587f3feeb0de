from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cloud.trainings import RunningTraining, running_training
from tests.shared.sites import local_core, site, tokens, train_bundle, unsettle
from tests.training_process import TrainingProcess
from trifold.cloud.train import sites
from trifold.edge.federation.core import RemoteCore
from trifold.proto.v1 import train_pb2 as pb
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import CodecName, Manifest
from trifold.shared.errors import DigestMismatch, InvalidRequest, Unavailable
from trifold.shared.session.channel import connect
from trifold.shared.training.lora import LoraSettings
from trifold.shared.training.site import Core
from trifold.shared.training.wire import Batch

SHAPE = (2, 16, 64)
ROWS = 2 * (4 * 128 + 12 * 68)
"""Bytes of a batch in int8."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As the process has: bits are promised for equal numbers of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bundle("deepseek_v3", tmp_path_factory.mktemp("train"))[1]


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return TierFolder.open(bundle, "edge").manifest


@pytest.fixture(scope="module")
def running(bundle: Path) -> Iterator[TrainingProcess]:
    with TrainingProcess(bundle) as training:
        yield training


def described(running: TrainingProcess) -> pb.TrainDescribeResponse:
    async def describe() -> bytes:
        async with connect(running.address) as channel:
            method: Any = channel.unary_unary("/trifold.proto.v1.TrainService/Describe")
            answer: bytes = await method(b"", timeout=20)
            return answer

    return pb.TrainDescribeResponse.FromString(asyncio.run(describe()))


def some(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> Batch:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def there_and_back(core: Core, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> tuple[Batch, Batch]:
    batch, rows = core.forward(some(seed, shape), keep=True)
    return rows, core.backward(batch, some(seed + 1000, shape))


def assert_equal(found: tuple[Batch, Batch], expected: tuple[Batch, Batch]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.float32
        assert np.array_equal(one, other)


@pytest.mark.parametrize("gradients", ["none", "bf16", "int8"])
def test_a_remote_core_gives_the_bits_of_a_local_one(
    bundle: Path, manifest: Manifest, running: TrainingProcess, gradients: CodecName
) -> None:
    local = local_core(bundle, "int8", gradients)
    with RemoteCore(running.address, manifest, gradients) as core:
        for seed in range(3):
            assert_equal(there_and_back(core, seed), there_and_back(local, seed))
        assert core.traffic.rows_up < 3 * (ROWS + 40)


def test_a_site_finds_out_whether_its_core_is_there_and_holds_its_bundle(
    running: TrainingProcess, manifest: Manifest
) -> None:
    with RemoteCore(running.address, manifest) as core:
        core.check()
    other = manifest.model_copy(update={"serving_digest": "e" * 64})
    with (
        RemoteCore(running.address, other) as core,
        pytest.raises(DigestMismatch, match=r"the site holds .* eeee"),
    ):
        core.check()
    with (
        RemoteCore("127.0.0.1:9", manifest) as core,
        pytest.raises(Unavailable, match="is `trifold cloud"),
    ):
        core.check()


def test_a_site_trains_with_a_remote_core_as_with_a_local_one(
    bundle: Path, manifest: Manifest, running: TrainingProcess
) -> None:
    gradients = []
    with RemoteCore(running.address, manifest) as remote:
        for core in (remote, local_core(bundle, "int8", "int8")):
            model = site(bundle, core=core)
            unsettle(model)
            model.loss(tokens(*SHAPE[:2])).backward()  # type: ignore[no-untyped-call]
            gradients.append([weight.grad for weight in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert one.equal(other)
        assert one.abs().sum() > 0


def test_with_adapters_on_the_device_alone_no_gradient_travels(
    bundle: Path, manifest: Manifest, running: TrainingProcess
) -> None:
    with RemoteCore(running.address, manifest) as core:
        model = site(bundle, LoraSettings(rank=4, tiers=("device",)), core=core)
        model.loss(tokens(*SHAPE[:2])).backward()  # type: ignore[no-untyped-call]
        assert core.traffic.rows_up > 0
        assert (core.traffic.gradients_up, core.traffic.gradients_down) == (0, 0)
        assert described(running).batches == 0


def test_a_process_killed_between_forward_and_backward_costs_nothing_but_time(
    bundle: Path, manifest: Manifest, running: TrainingProcess
) -> None:
    local = local_core(bundle, "int8", "int8")
    with RemoteCore(running.address, manifest) as core:
        first, _ = core.forward(some(1), keep=True)
        second, _ = core.forward(some(2), keep=True)
        running.kill()
        running.start()
        for batch, seed in ((first, 1), (second, 2)):
            same, _ = local.forward(some(seed), keep=True)
            assert np.array_equal(core.backward(batch, some(9)), local.backward(same, some(9)))
        assert 4 * ROWS < core.traffic.rows_up < 5 * ROWS
        assert_equal(there_and_back(core, 3), there_and_back(local, 3))
        assert 5 * ROWS < core.traffic.rows_up < 6 * ROWS


def test_a_process_that_is_away_for_a_while_is_waited_for(
    bundle: Path, manifest: Manifest, running: TrainingProcess
) -> None:
    with RemoteCore(running.address, manifest) as core, ThreadPoolExecutor() as pool:
        there_and_back(core)
        assert running.stop() == 0
        asked = pool.submit(there_and_back, core, 5)
        running.start()
        assert_equal(asked.result(60), there_and_back(local_core(bundle, "int8", "int8"), 5))


def test_a_batch_of_many_messages_is_one_batch(
    bundle: Path, manifest: Manifest, running: TrainingProcess
) -> None:
    shape = 160, 128, 64
    with RemoteCore(running.address, manifest, "none") as core:
        assert_equal(
            there_and_back(core, 7, shape), there_and_back(local_core(bundle, "int8", "none"), 7, shape)
        )
        assert core.traffic.gradients_up > 5 * 2**20


def test_both_ends_count_the_same_bytes(manifest: Manifest, running: TrainingProcess) -> None:
    with RemoteCore(running.address, manifest, "bf16") as core:
        before = described(running).traffic
        for seed in range(4):
            there_and_back(core, seed)
        after = described(running).traffic
        for field in pb.Traffic.DESCRIPTOR.fields:
            counted = getattr(after, field.name) - getattr(before, field.name)
            assert counted == getattr(core.traffic, field.name)
        gradients = 2 * 16 * 128
        assert 4 * ROWS < core.traffic.rows_up < 4 * (ROWS + 40)
        assert 4 * ROWS < core.traffic.rows_down < 4 * (ROWS + 40)
        assert 4 * gradients < core.traffic.gradients_up < 4 * (gradients + 40)
        assert 4 * gradients < core.traffic.gradients_down < 4 * (gradients + 40)


def test_sites_that_train_at_once_get_what_each_alone_would(
    bundle: Path, manifest: Manifest, running: TrainingProcess
) -> None:
    def train(first: int) -> list[tuple[Batch, Batch]]:
        with RemoteCore(running.address, manifest) as core:
            return [there_and_back(core, first + number) for number in range(8)]

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(train, (0, 100)))
    local = local_core(bundle, "int8", "int8")
    for first, found in zip((0, 100), both, strict=True):
        for number, one in enumerate(found):
            assert_equal(one, there_and_back(local, first + number))


def test_gradients_for_a_batch_that_was_not_kept_are_refused(
    manifest: Manifest, running: TrainingProcess
) -> None:
    with RemoteCore(running.address, manifest) as core:
        batch, _ = core.forward(some(), keep=False)
        with pytest.raises(InvalidRequest, match="awaits no gradients"):
            core.backward(batch, some())
        kept = [core.forward(some(seed), keep=True)[0] for seed in range(9)]
        with pytest.raises(InvalidRequest, match="awaits no gradients"):
            core.backward(kept[0], some())
        core.backward(kept[1], some())


def test_a_batch_that_is_too_large_is_refused_before_it_is_sent(
    manifest: Manifest, running: TrainingProcess
) -> None:
    with RemoteCore(running.address, manifest) as core:
        with pytest.raises(InvalidRequest, match="accumulate smaller ones"):
            core.forward(np.zeros((1025, 256, 64), np.float32), keep=True)
        assert core.traffic.rows_up == 0
        there_and_back(core)


def test_a_process_of_another_bundle_is_refused(
    manifest: Manifest, running: TrainingProcess, tmp_path: Path
) -> None:
    _, other = train_bundle("llama", tmp_path)
    theirs = TierFolder.open(other, "edge").manifest
    with RemoteCore(running.address, theirs) as core, pytest.raises(DigestMismatch, match="the same bundle"):
        core.forward(some(), keep=True)


def test_a_process_that_is_not_there_is_told_with_what_to_do(manifest: Manifest) -> None:
    with (
        RemoteCore("127.0.0.1:1", manifest, timeout=0.3) as core,
        pytest.raises(Unavailable, match=r"gave no answer for 0\.3 s: is `trifold cloud train` running"),
    ):
        core.forward(some(), keep=True)


async def at_work(
    training: RunningTraining, core: RemoteCore, monkeypatch: pytest.MonkeyPatch, *, looks: int, others: bool
) -> tuple[Batch, Batch]:
    """What a site gets of an engine that goes on only after so many looks at the process.

    With `others` there are other sites' batches that it goes on with meanwhile.
    """
    service, go_on = training.service, threading.Event()
    forward, describe = service.core.forward, service.describe

    def later(*args: Any, **options: Any) -> Any:
        go_on.wait()
        return forward(*args, **options)

    async def looked_at() -> pb.TrainDescribeResponse:
        nonlocal looks
        looks -= 1
        service.traffic.rows_down += others
        if looks == 0:
            go_on.set()
        return await describe()

    monkeypatch.setattr(service.core, "forward", later)
    monkeypatch.setattr(service, "describe", looked_at)
    try:
        return await asyncio.to_thread(there_and_back, core)
    finally:
        go_on.set()


async def test_a_process_that_is_busy_with_others_is_waited_for(
    bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_training(bundle) as training:
        core = RemoteCore(training.server.address, manifest, timeout=0.1)
        found = await at_work(training, core, monkeypatch, looks=4, others=True)
        await asyncio.to_thread(core.close)
        assert_equal(found, there_and_back(local_core(bundle, "int8", "int8")))


async def test_a_process_that_goes_on_with_nothing_is_told_apart_from_one_that_is_not_there(
    bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_training(bundle) as training:
        core = RemoteCore(training.server.address, manifest, timeout=0.1)
        with pytest.raises(Unavailable, match=r"is there, and has answered no site for 0\.1 s: .*--timeout"):
            await at_work(training, core, monkeypatch, looks=99, others=False)
        await asyncio.to_thread(core.close)


async def test_a_process_that_turns_a_site_away_is_told_with_its_reason(
    bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sites, "MOST_SITES", 0)
    async with running_training(bundle) as training:
        core = RemoteCore(training.server.address, manifest, timeout=0.1)
        with pytest.raises(
            Unavailable, match=r"turned this site away for 0\.1 s: 0 sites train here already"
        ):
            await asyncio.to_thread(core.forward, some(), keep=True)
        await asyncio.to_thread(core.close)


def test_the_client_of_the_core_needs_no_torch() -> None:
    script = "import sys, trifold.edge.federation.core; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
