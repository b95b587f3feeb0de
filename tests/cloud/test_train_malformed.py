"""Malformed frames by the hundred at a training process, and a site beside them that is not harmed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import grpc.aio
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.shared.sites import local_core, train_bundle
from tests.training_process import TrainingProcess
from trifold.edge.federation.core import RemoteCore
from trifold.proto.v1 import session_pb2
from trifold.proto.v1 import train_pb2 as pb
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import Manifest
from trifold.shared.errors import TrifoldError
from trifold.shared.session.channel import connect
from trifold.shared.session.status import from_rpc_error

FRAMES: Final = 300
BYTES: Final = 4 * 128 + 4 * 68
"""One sequence of eight rows in int8."""

codecs = st.one_of(st.integers(-1, 9), st.just(2**31 - 1))
numbers = st.one_of(st.integers(0, 300), st.sampled_from([2**16, 2**31 - 1, 2**31, 2**32 - 1]))
batches = st.builds(
    pb.Batch,
    id=st.integers(0, 2**64 - 1),
    sequences=st.one_of(st.just(1), numbers),
    length=st.one_of(st.just(8), numbers),
    codec=st.one_of(st.just(session_pb2.CODEC_INT8), codecs),
)
data = st.one_of(st.binary(max_size=40), st.binary(min_size=BYTES, max_size=BYTES), st.just(bytes(BYTES + 1)))
requests = st.one_of(
    st.builds(pb.TrainRequest, forward=st.builds(pb.Forward, batch=batches, keep=st.booleans(), data=data)),
    st.builds(pb.TrainRequest, backward=st.builds(pb.Backward, batch=batches, data=data)),
    st.builds(pb.TrainRequest, piece=st.builds(pb.Piece, data=data)),
    st.builds(
        pb.TrainRequest, open=st.builds(pb.TrainOpen, session=st.binary(max_size=40), gradients=codecs)
    ),
    st.builds(pb.TrainRequest),
).map(lambda request: request.SerializeToString())


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A message with a bit turned, its end lost, or bytes put into it."""
    message = bytearray(draw(requests.filter(bool)))
    place = draw(st.integers(0, len(message) - 1))
    match draw(st.integers(0, 2)):
        case 0:
            message[place] ^= 1 << draw(st.integers(0, 7))
        case 1:
            del message[place:]
        case 2:
            message[place:place] = draw(st.binary(min_size=1, max_size=8))
    return bytes(message)


frames = st.one_of(requests, damaged(), st.binary(max_size=200))


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
    return TierFolder.open(bundle, "cloud").manifest


@pytest.fixture(scope="module")
def training(bundle: Path) -> Iterator[TrainingProcess]:
    with TrainingProcess(bundle) as training:
        yield training


async def say(address: str, *said: bytes) -> TrifoldError | None:
    """What a stream ends with on which this is said, and no more."""
    async with connect(address) as channel, asyncio.timeout(30):
        method: Any = channel.stream_stream("/trifold.proto.v1.TrainService/Train")
        call = method(wait_for_ready=True)
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            for message in said:
                await call.write(message)
            await call.done_writing()
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error)
        return None


@pytest.mark.parametrize("opened", [False, True])
def test_no_frame_harms_the_process_or_a_site_beside_it(
    bundle: Path, manifest: Manifest, training: TrainingProcess, opened: bool
) -> None:
    told: Counter[str] = Counter()
    opening = pb.TrainOpen(
        session=b"0123456789abcdef",
        serving_digest=manifest.serving_digest,
        gradients=session_pb2.CODEC_INT8,
    )
    before = [pb.TrainRequest(open=opening).SerializeToString()] if opened else []

    @settings(max_examples=FRAMES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(frame=frames)
    def attempt(frame: bytes) -> None:
        error = asyncio.run(say(training.address, *before, frame))
        told[error.reason if error else "OK"] += 1

    rows, gradients = np.random.default_rng(0).standard_normal((2, 2, 16, 64), np.float32)
    local = local_core(bundle, "int8", "int8")
    with RemoteCore(training.address, manifest) as honest:
        kept, there = honest.forward(rows, keep=True)
        attempt()
        same, expected = local.forward(rows, keep=True)
        assert np.array_equal(there, expected)
        assert np.array_equal(honest.backward(kept, gradients), local.backward(same, gradients))
        assert honest.traffic.rows_up < 2 * 2 * (4 * 128 + 12 * 68)
    assert told.total() >= FRAMES
    assert told["INTERNAL"] == told["UNAVAILABLE"] == 0
    assert told["INVALID_REQUEST"] > FRAMES / 4
    assert "internal error" not in training.log
