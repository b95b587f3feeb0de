"""The link to the core: what a token's round trip and a prompt's rows take, in a session like any other.

A real session, and no message made for measuring: its rows are of the size, the codec and the chunks that
serving sends, both ways, and that it is opened at all proves the rest. The core tells how long it was at work
itself. It computes some prompts of random rows for this, as for a user, and frees their memory at once.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Final

import numpy as np

from trifold.edge.doctor.check import Check
from trifold.edge.doctor.finding import Finding, fault, ok, skipped, warning
from trifold.edge.doctor.patient import Patient
from trifold.edge.doctor.tiers import own
from trifold.edge.service.upstream import Core, CoreStream
from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.bundle.manifest import Manifest
from trifold.shared.errors import (
    ConfigError,
    DeadlineExceeded,
    DigestMismatch,
    Forbidden,
    Overloaded,
    TrifoldError,
    Unauthenticated,
    Unavailable,
)
from trifold.shared.identity.node import Node
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.session.frames import SESSION_BYTES
from trifold.shared.telemetry.traces import NOT_TRACED

_PROMPT: Final = 512
_TRIES: Final = 3

_ENOUGH: Final = 0.5
"""Seconds: a chunk that was so long under way needs no repetition, and none that is larger."""

_SLOW: Final = 5.0
"""Seconds on the way for a prompt of _PROMPT tokens."""


@dataclass(frozen=True)
class Crossing:
    """One step: bytes of both messages, and the seconds that were not the core's own."""

    rows: int
    size: int
    seconds: float


def examine(patient: Patient) -> Iterator[Finding]:
    # Nothing but an edge is told of a core: a node of another role was given by mistake.
    if patient.core and patient.tls and (role := Node(patient.tls).identity.role) != "edge":
        told = f"the core has sessions with edges only, and this node is a {role}"
        if role == "core":
            yield skipped(told)
        else:
            yield fault(told, "for an edge enrol a node with `trifold certs token --role edge`")
        return
    if patient.core is None or patient.bundle is None:
        yield skipped("a session needs --core and --bundle")
        return
    try:
        manifest = own(patient.bundle)[0].manifest
    except TrifoldError:
        yield skipped("the bundle is not whole")
        return
    try:
        token, largest = asyncio.run(_measured(patient, patient.core, manifest))
    except (Unavailable, DigestMismatch, ConfigError, Unauthenticated, Forbidden) as error:
        # The core's own check says what to do.
        yield skipped(f"no session with the core: {error.message}")
    except Overloaded as error:
        yield warning(f"the core has no room for a session: {error.message}", "try again later")
    else:
        yield _told(token, largest)


def _told(token: Crossing, largest: Crossing) -> Finding:
    way = largest.seconds - token.seconds
    trip = f"a token's rows are {token.seconds * 1000:.1f} ms under way"
    if way <= token.seconds / 10:
        return ok(f"{trip}; {largest.size / 1000:.0f} kB take no longer: it is too fast to be measured")
    rate = (largest.size - token.size) / way
    prompt = token.seconds + way * _PROMPT / largest.rows
    speed = f"{rate / 1e6:.1f} MB/s there and back ({largest.size / 1000:.0f} kB)"
    told = f"{trip}; {speed}: a prompt of {_PROMPT} tokens takes {prompt:.1f} s on the way"
    return ok(told) if prompt < _SLOW else warning(told)


async def _measured(patient: Patient, address: str, manifest: Manifest) -> tuple[Crossing, Crossing]:
    """The fastest crossings of one row, and of as many as a step may have or _ENOUGH is reached with."""
    core = Core(address, patient.timeout, tls=patient.tls, insecure=patient.insecure)
    most = min(_PROMPT, manifest.serving.spec.max_positions)
    opening = pb.Open(
        session=secrets.token_bytes(SESSION_BYTES),
        epoch=1,
        serving_digest=manifest.serving_digest,
        capacity=most,
    )
    try:
        # Which says at once that the core is not there: a session would wait for it.
        await core.describe()
        async with core.open(opening, NOT_TRACED) as stream:
            steps = Steps(stream, opening, manifest, patient.timeout)
            token = await steps.fastest(1)
            largest = token
            while largest.rows < min(most, stream.opened.max_rows) and largest.seconds < _ENOUGH:
                largest = await steps.fastest(min(8 * largest.rows, most, stream.opened.max_rows))
            await stream.close()
    finally:
        await core.close()
    return token, largest


class Steps:
    """Steps of random rows, each of which begins the session anew."""

    def __init__(self, stream: CoreStream, opening: pb.Open, manifest: Manifest, timeout: float) -> None:
        self._stream = stream
        self._opening = opening
        self._codec = RowCodec(manifest.serving.codec, manifest.serving.spec.hidden)
        self._timeout = timeout
        self._random = np.random.Generator(np.random.Philox(key=3))

    async def fastest(self, rows: int) -> Crossing:
        """The fastest of a few, or the first that is slow. Raises what ends the stream, DeadlineExceeded."""
        crossings = []
        for _ in range(_TRIES):
            crossings.append(await self._one(rows))
            if crossings[-1].seconds > _ENOUGH:
                break
        return min(crossings, key=lambda crossing: crossing.seconds)

    async def _one(self, rows: int) -> Crossing:
        values = self._random.standard_normal((rows, self._codec.hidden), np.float32)
        data = self._codec.encode(values, 0)
        header = pb.Header(session=self._opening.session, epoch=self._opening.epoch, rows=rows)
        began = perf_counter()
        try:
            async with asyncio.timeout(self._timeout):
                up = await self._stream.send(header, self._codec.wire, data)
                response, down = await self._stream.receive()
        except TimeoutError:
            told = f"{rows} rows of {up / 1000:.0f} kB were not answered within {self._timeout:g} s"
            raise DeadlineExceeded(told) from None
        seconds = perf_counter() - began - sum(hop.total_ns for hop in response.result.hops) / 1e9
        return Crossing(rows, up + down, max(seconds, 0.0))


LINK = Check(
    "link",
    examine,
    "take a faster link, or a smaller wire codec (`trifold split --codec int8`); where large messages "
    "are lost and small ones are not, lower the MTU",
    as_node=True,
)
