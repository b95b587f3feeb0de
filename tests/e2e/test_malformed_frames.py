"""A matrix of malformed frames: more than a thousand for every call, and every other session unharmed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import batched, product
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from tests.processes import Processes, Service
from tests.wire import Name, Peer, Talk
from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import TrifoldError
from trifold.shared.runtime.codec import Rows
from trifold.shared.runtime.monolith import Monolith

FRAMES: Final = 1000
AT_A_TIME: Final = 50
POSITIONS: Final = 64

EXTREMES: Final = (0, 1, 2, 3, 5, 63, 64, 65, 511, 512, 513, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
"""For fields of 32 bits and up."""

NAMES: Final[dict[Service, Name]] = {"edge": "EdgeService", "cloud": "CoreService"}


@pytest.fixture(scope="module")
def monolith(bundle: Path) -> Monolith:
    return Monolith.load(bundle)


@pytest.fixture(scope="module")
def tiers(bundle: Path) -> Iterator[Processes]:
    with Processes(bundle, "--lease", "1") as running:
        yield running


class Neighbour:
    """A session of an honest device, which goes on step by step and compares every bit."""

    def __init__(self, talk: Talk, monolith: Monolith) -> None:
        self._talk = talk
        self._position = 0
        self._tokens = np.random.default_rng(7).integers(0, monolith.edge.vocab, 256)
        session = monolith.session(256)
        session.feed(self._tokens, 0, 0)
        self._expected: Rows = session.rows
        self._codec = monolith.codec

    async def step(self) -> None:
        position = self._position
        await self._talk.send_tokens(self._tokens[position : position + 1], position)
        result = await self._talk.result()
        row = self._codec.decode(result.rows, 1, position)
        assert np.array_equal(row[0], self._expected[position]), f"position {position}"
        self._position += 1


@asynccontextmanager
async def neighbour(tiers: Processes, monolith: Monolith) -> AsyncIterator[Neighbour]:
    async with Peer.at(tiers.edge, "EdgeService") as peer:
        talk = peer.call()
        await talk.open(monolith.manifest.serving_digest, 256)
        yield Neighbour(talk, monolith)
        await talk.close()


class Frames:
    """What a caller of one service could say: rightly, and wrongly in every way that occurs to us."""

    def __init__(self, service: Service, monolith: Monolith) -> None:
        self.service: Service = service
        self.digest = monolith.manifest.serving_digest
        self._codec = monolith.codec
        self._random = random.Random(service)

    def opening(self, **fields: object) -> pb.SessionRequest:
        session = self._random.randbytes(16)
        honest = {"session": session, "epoch": 1, "serving_digest": self.digest, "capacity": POSITIONS}
        return pb.SessionRequest(open=pb.Open(**{**honest, **fields}))

    def step(self, talk: Talk, rows: int = 1, **fields: object) -> pb.SessionRequest:
        """An honest step at position 0 but for what `fields` say."""
        if self.service == "edge":
            return talk.step(0, rows, **{"tokens": [1] * rows, **fields})
        values = np.ones((rows, self._codec.hidden), np.float32)
        honest = {"rows_data": self._codec.encode(values, 0), "codec": self._codec.wire}
        return talk.step(0, rows, **{**honest, **fields})

    def openings(self) -> Iterator[bytes]:
        """First messages."""
        for length in range(33):
            yield self.opening(session=b"s" * length).SerializeToString()
        for field, value in product(("epoch", "capacity", "steps_in_flight"), EXTREMES):
            yield self.opening(**{field: value}).SerializeToString()
        for digest in ("", "0" * 64, self.digest.upper(), self.digest[:-1], self.digest * 2, "x" * 10_000):
            yield self.opening(serving_digest=digest).SerializeToString()
            yield self.opening(adapter_digest=digest).SerializeToString()
        for number in (float("nan"), float("inf"), -1.0, 1e38):
            yield self.opening(sampling=pb.Sampling(temperature=number)).SerializeToString()
            yield self.opening(sampling=pb.Sampling(top_p=number)).SerializeToString()
        yield pb.SessionRequest(close=pb.Close()).SerializeToString()
        yield pb.SessionRequest(step=pb.Step()).SerializeToString()
        yield from self.damaged(self.opening().SerializeToString())

    def steps(self, talk: Talk) -> Iterator[Callable[[], bytes]]:
        """Messages after an Open, each made for the stream `talk` when called."""
        fields = ("epoch", "branch", "seq", "base_pos", "rows", "logits_from")
        for field, value in product(fields, EXTREMES):
            yield lambda field=field, value=value: self.step(talk, **{field: value}).SerializeToString()
        for codec in (*range(8), 2**31 - 1):
            yield lambda codec=codec: self.step(talk, codec=codec).SerializeToString()
        for rows, payload in product((1, 2, 5, 64, 65), (b"", b"\0", b"\xff" * 128, b"\x7f" * 340, bytes(9000))):
            yield lambda rows=rows, data=payload: self.step(
                talk, rows, rows_data=data, codec=3
            ).SerializeToString()
        for ids in ([], [1, 2], [384], [2**32 - 1], [0] * 513, list(range(1000))):
            yield lambda ids=ids: self.step(talk, tokens=ids).SerializeToString()
            yield lambda ids=ids: self.step(talk, tokens=ids, rows=len(ids)).SerializeToString()
        for length in (0, 1, 15, 17, 100):
            yield lambda length=length: self.step(talk, session=b"s" * length).SerializeToString()
        yield lambda: self.opening().SerializeToString()
        yield lambda: pb.SessionRequest().SerializeToString()
        yield lambda: b""
        while True:
            yield lambda: next(iter(self.damaged(self.step(talk, 3).SerializeToString(), count=1)))

    def damaged(self, message: bytes, count: int = FRAMES) -> Iterator[bytes]:
        """The message with bits turned, ends lost, bytes put in, and bytes that were never one."""
        chance = self._random
        for _ in range(count):
            data = bytearray(message)
            match chance.randrange(5):
                case 0:
                    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
                case 1:
                    del data[chance.randrange(len(data)) :]
                case 2:
                    at = chance.randrange(len(data))
                    data[at:at] = chance.randbytes(chance.randrange(1, 9))
                case 3:
                    data += chance.randbytes(chance.randrange(1, 30))
                case 4:
                    data = bytearray(chance.randbytes(chance.randrange(1, 200)))
            yield bytes(data)


async def outcome(talk: Talk) -> TrifoldError | None:
    """What a caller gets who has said all: answers or an error within a moment, but never silence."""
    await talk.finish()
    async with asyncio.timeout(30):
        return await talk.end()


async def try_all(
    tries: list[Awaitable[TrifoldError | None]], tiers: Processes, monolith: Monolith
) -> list[TrifoldError | None]:
    """Tries them side by side beside an honest session. None may be an error of ours."""
    outcomes: list[TrifoldError | None] = []
    async with neighbour(tiers, monolith) as honest:
        for some in batched(tries, AT_A_TIME):
            results, _ = await asyncio.gather(asyncio.gather(*some), honest.step())
            outcomes += results
    internal = [error for error in outcomes if type(error) is TrifoldError]
    assert not internal
    return outcomes
