"""The core: is it there, does it serve this bundle, and how far away is it?"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from statistics import median
from time import perf_counter
from typing import Final

from trifold.edge.doctor.certificate import ENROL
from trifold.edge.doctor.check import Check
from trifold.edge.doctor.finding import Finding, fault, ok, skipped, warning
from trifold.edge.doctor.patient import MIB, Patient
from trifold.edge.doctor.reach import unreached
from trifold.edge.doctor.tiers import own
from trifold.edge.service.upstream import Core
from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import DeadlineExceeded, TrifoldError, Unauthenticated, Unavailable
from trifold.shared.session.channel import way

_ROUNDS: Final = 10

_FAR: Final = 0.15
"""Seconds of a round trip, of which every token takes one."""


def examine(patient: Patient) -> Iterator[Finding]:
    if patient.core is None:
        yield skipped("no --core was given")
        return
    try:
        told, trips = asyncio.run(_asked(patient, patient.core))
    except (Unavailable, DeadlineExceeded) as error:
        yield unreached(patient.core, error, way(patient.core, patient.tls, insecure=True))
        return
    except Unauthenticated as error:
        yield fault(error.message, ENROL)
        return
    yield _bundle(patient, told)
    yield from _state(told)
    typical, longest = median(trips), max(trips)
    trip = f"round trip {typical * 1000:.1f} ms, of {_ROUNDS} the longest {longest * 1000:.1f} ms"
    yield (
        ok(trip)
        if typical < _FAR
        else warning(f"{trip}: every token waits so long", "take a core that is nearer")
    )


async def _asked(patient: Patient, address: str) -> tuple[pb.DescribeResponse, list[float]]:
    """What the core tells, and the seconds of some round trips on a connection that is open."""
    core = Core(address, patient.timeout, tls=patient.tls, insecure=patient.insecure)
    try:
        told, trips = await core.describe(), []
        for _ in range(_ROUNDS):
            began = perf_counter()
            await core.describe()
            trips.append(perf_counter() - began)
        return told, trips
    finally:
        await core.close()


def _bundle(patient: Patient, told: pb.DescribeResponse) -> Finding:
    theirs = told.serving_digest[:12]
    try:
        folders = own(patient.bundle) if patient.bundle else []
    except TrifoldError:
        # The bundle's own check says what is wrong with it.
        folders = []
    if not folders:
        return ok(f"it serves bundle {theirs}")
    ours = folders[0].manifest.serving_digest
    if ours != told.serving_digest:
        copy = "copy this machine's part from the bundle that the core serves, or give the core this one"
        return fault(f"it serves bundle {theirs}, here lies {ours[:12]}: sessions are refused", copy)
    return ok(f"it serves this bundle, {theirs}")


def _state(told: pb.DescribeResponse) -> Iterator[Finding]:
    """Whether it would take a session now, and what it says of itself."""
    if told.draining:
        yield warning("it is shutting down", "wait until it is back")
    for tier in told.tiers:
        yield ok(f"Trifold {tier.version}, {tier.fingerprint}")
        if not tier.exact:
            yield warning(
                "its numerics self-test failed, and it was started with --inexact",
                "take other hardware there",
            )
    kv, most = told.kv_bytes // MIB, told.kv_bytes_limit // MIB
    load = f"{told.sessions} sessions hold {kv} of {most} MiB"
    full = told.kv_bytes > 0.9 * told.kv_bytes_limit
    yield warning(f"it is full: {load}", "give it more --kv-memory, or fewer sites") if full else ok(load)


CORE = Check(
    "core",
    examine,
    "is `trifold cloud serve` running there, and are address, TLS and role right?",
    as_node=True,
)
