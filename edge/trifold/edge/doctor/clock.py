"""Does the clock here agree with others'? A machine that lives in 1970 has no use for certificates."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from time import perf_counter, time
from typing import Final

from trifold.edge.doctor.authority import time_at
from trifold.edge.doctor.check import Check
from trifold.edge.doctor.finding import Finding, fault, ok, skipped, warning
from trifold.edge.doctor.patient import Patient
from trifold.edge.service.upstream import Core
from trifold.shared.errors import TrifoldError
from trifold.shared.identity.node import Node

_AGREES: Final = 2.0
_WRONG: Final = 60.0
"""Seconds: below the first nobody minds, above the second certificates begin to be refused."""


def examine(patient: Patient) -> Iterator[Finding]:
    for name, offset in _offsets(patient):
        if offset is None:
            continue
        told = f"the clock here is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} {name}'s"
        if abs(offset) <= _AGREES:
            yield ok(f"agrees with {name}'s")
        elif abs(offset) <= _WRONG:
            yield warning(
                told, "the times of their logs and traces do not agree: let both follow a time server"
            )
        else:
            yield fault(told)
        return
    yield skipped("nobody who was given could be asked: give --core, or --tls of a node with an authority")


def _offsets(patient: Patient) -> Iterator[tuple[str, float | None]]:
    """Seconds that this clock is ahead of others', each asked only when the one before it said nothing."""
    if patient.core:
        yield f"the core at {patient.core}", _ahead_of_core(patient, patient.core)
    if patient.tls:
        yield "the authority", _ahead_of_authority(patient)


def _ahead_of_core(patient: Patient, address: str) -> float | None:
    try:
        return asyncio.run(_asked(patient, address))
    except TrifoldError:
        # The check of the core says what is wrong with it.
        return None


async def _asked(patient: Patient, address: str) -> float | None:
    core = Core(address, patient.timeout, tls=patient.tls, insecure=patient.insecure)
    try:
        await core.describe()
        began = perf_counter()
        told = (await core.describe()).time_ms
        # The answer is as old as half of the way there and back.
        return time() - (perf_counter() - began) / 2 - told / 1000 if told else None
    finally:
        await core.close()


def _ahead_of_authority(patient: Patient) -> float | None:
    try:
        node = Node(patient.tls or "")
        return time() - time_at(node).timestamp() if node.authority_address else None
    except TrifoldError:
        return None


CLOCK = Check(
    "clock",
    examine,
    "set it, and keep it set: `timedatectl set-ntp true` (a Jetson without a battery forgets it); "
    "if it is right, set the other one",
)
