"""A matrix of malformed frames: a thousand for every call, and every other session unharmed."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from tests.neighbour import neighbour
from tests.processes import Processes, Service
from tests.wire import Name, Peer, Talk
from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import TrifoldError
from trifold.shared.runtime.monolith import Monolith

FRAMES: Final = 1000
AT_A_TIME: Final = 25
POSITIONS: Final = 64

EXTREMES: Final = (0, 1, 2, 3, 5, 63, 64, 65, 511, 512, 513, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
"""For fields of 32 bits and up."""

NUMBERS: Final = (float("nan"), float("inf"), -1.0, 1e38)

NAMES: Final[dict[Service, Name]] = {"edge": "EdgeService", "cloud": "CoreService"}

Make = Callable[[Talk], bytes]
"""Makes a frame for the stream on which it is to be said."""

Try = Callable[[Peer], Awaitable[TrifoldError | None]]


@pytest.fixture(scope="module")
def monolith(bundle: Path) -> Monolith:
    return Monolith.load(bundle)


@pytest.fixture(scope="module")
def tiers(bundle: Path) -> Iterator[Processes]:
    with Processes(bundle, "--lease", "1") as running:
        yield running


class Frames:
    """What a caller of one service could say: rightly, and wrongly in every way that occurs to us."""

    def __init__(self, service: Service, monolith: Monolith) -> None:
        self._service = service
        self._digest = monolith.manifest.serving_digest
        self._codec = monolith.codec
        self._random = random.Random(service)

    def openings(self) -> list[Make]:
        """First messages of a stream."""
        digests = ("", "0" * 64, self._digest.upper(), self._digest[:-1], self._digest * 2, "x" * 10_000)
        odd: list[dict[str, Any]] = [
            *({"session": b"s" * length} for length in range(33)),
            *({field: value} for field in ("capacity", "steps_in_flight") for value in EXTREMES),
            *({"epoch": value} for value in (*EXTREMES, 2**64 - 1)),
            *({field: value} for field in ("serving_digest", "adapter_digest") for value in digests),
            *({"sampling": pb.Sampling(temperature=value)} for value in NUMBERS),
            *({"sampling": pb.Sampling(top_p=value)} for value in NUMBERS),
        ]
        frames: list[Make] = [partial(self._opening, fields) for fields in odd]
        frames += [lambda _: pb.SessionRequest(close=pb.Close()).SerializeToString(), lambda _: b""]
        frames += [lambda talk: self._step({}, talk)]
        return frames + [partial(self._damaged, partial(self._opening, {}))] * (FRAMES - len(frames))

    def steps(self) -> list[Make]:
        """Messages behind an Open and one honest step."""
        numbers = ("branch", "base_pos", "rows", "logits_from", "codec")
        payloads = (b"", b"\0", b"\xff" * 128, b"\x7f" * 340, bytes(9000))
        tokens: tuple[list[int], ...] = ([], [1, 2], [384], [2**32 - 1], [0] * 513, list(range(1000)))
        odd: list[dict[str, Any]] = [
            *({field: value} for field in numbers for value in EXTREMES if field != "codec" or value < 2**31),
            *({field: value} for field in ("epoch", "seq") for value in (*EXTREMES, 2**64 - 1)),
            *({"session": b"s" * length} for length in range(33)),
            *({"rows": rows, "rows_data": data} for rows in (1, 2, 5, 64, 65) for data in payloads),
            *({"rows": rows, "tokens": ids} for rows in (1, 2, 513, 1000) for ids in tokens),
        ]
        frames: list[Make] = [partial(self._step, fields) for fields in odd]
        frames += [
            partial(self._opening, {}),
            lambda _: b"",
            lambda _: pb.SessionRequest().SerializeToString(),
        ]
        return frames + [partial(self._damaged, partial(self._step, {}))] * (FRAMES - len(frames))

    def descriptions(self) -> list[bytes]:
        """Requests of Describe."""
        return [self._random.randbytes(self._random.randrange(200)) for _ in range(FRAMES)]

    def honest_step(self, talk: Talk) -> bytes:
        """The first step of a session."""
        return self._step({}, talk)

    def _opening(self, fields: dict[str, Any], _: Talk) -> bytes:
        honest = {
            "session": self._random.randbytes(16),
            "epoch": 1,
            "serving_digest": self._digest,
            "capacity": POSITIONS,
        }
        return pb.SessionRequest(open=pb.Open(**{**honest, **fields})).SerializeToString()

    def _step(self, fields: dict[str, Any], talk: Talk) -> bytes:
        """The step of one row that comes next, but for what `fields` say."""
        header = {"base_pos": talk.seq, "rows": 1, **fields}
        if self._service == "cloud":
            header = {"codec": self._codec.wire, **header}
        if not {"tokens", "rows_data"} & header.keys():
            ones = np.ones((1, self._codec.hidden), np.float32)
            edge = self._service == "edge"
            header |= {"tokens": [1]} if edge else {"rows_data": self._codec.encode(ones, talk.seq)}
        return talk.step(header.pop("base_pos"), header.pop("rows"), **header).SerializeToString()

    def _damaged(self, honest: Make, talk: Talk) -> bytes:
        """A message with a bit turned, its end lost, bytes put into or behind it, or one that never was."""
        chance = self._random
        data = bytearray(honest(talk))
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
        return bytes(data)


async def say_first(peer: Peer, make: Make) -> TrifoldError | None:
    """What a stream ends with that begins with a frame: never silence."""
    talk = peer.call()
    await talk.say(make(talk))
    return await ending(talk)


async def say_then(peer: Peer, frames: Frames, digest: str, make: Make) -> TrifoldError | None:
    """What a stream ends with that goes on with a frame after an Open and an honest step."""
    talk = peer.call()
    await talk.open(digest, POSITIONS)
    await talk.say(frames.honest_step(talk))
    await talk.result()
    await talk.say(make(talk))
    return await ending(talk)


async def ending(talk: Talk) -> TrifoldError | None:
    await talk.finish()
    async with asyncio.timeout(30):
        return await talk.end()


async def ask(peer: Peer, request: bytes) -> TrifoldError | None:
    try:
        await peer.describe(request)
    except TrifoldError as error:
        return error
    return None


async def try_all(tries: Sequence[Try], tiers: Processes, service: Service, monolith: Monolith) -> None:
    """Many at a time, beside an honest session: every error is the caller's, and no service is harmed."""
    pid = tiers.pid(service)
    told: Counter[str] = Counter()
    async with (
        neighbour(tiers.edge, monolith) as honest,
        Peer.at(tiers.address(service), NAMES[service]) as peer,
    ):
        for first in range(0, len(tries), AT_A_TIME):
            some = [attempt(peer) for attempt in tries[first : first + AT_A_TIME]]
            errors, _ = await asyncio.gather(asyncio.gather(*some), honest.step())
            told.update(error.reason if error else "OK" for error in errors)
    assert told.total() >= FRAMES
    assert told["INTERNAL"] == 0
    assert told["UNAVAILABLE"] == 0
    assert told["INVALID_REQUEST"] > FRAMES / 4
    assert tiers.pid(service) == pid
    assert "internal error" not in tiers.log(service)


@pytest.mark.parametrize("service", ["edge", "cloud"])
async def test_no_first_message_harms_a_service(
    service: Service, tiers: Processes, monolith: Monolith
) -> None:
    frames = Frames(service, monolith)
    tries = [partial(say_first, make=make) for make in frames.openings()]
    await try_all(tries, tiers, service, monolith)


@pytest.mark.parametrize("service", ["edge", "cloud"])
async def test_no_later_message_harms_a_service(
    service: Service, tiers: Processes, monolith: Monolith
) -> None:
    frames, digest = Frames(service, monolith), monolith.manifest.serving_digest
    tries = [partial(say_then, frames=frames, digest=digest, make=make) for make in frames.steps()]
    await try_all(tries, tiers, service, monolith)


@pytest.mark.parametrize("service", ["edge", "cloud"])
async def test_no_description_that_is_asked_for_harms_a_service(
    service: Service, tiers: Processes, monolith: Monolith
) -> None:
    requests = Frames(service, monolith).descriptions()
    await try_all([partial(ask, request=request) for request in requests], tiers, service, monolith)
