"""The trace of a token: what ran where, for how long, and what went over the links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from trifold.device.client.stream import Delivery
from trifold.proto.v1 import session_pb2 as pb


@dataclass(frozen=True)
class TierTime:
    """What one tier spent on a token: waiting for its engine, computing, and altogether.

    `reused` positions it knew from another session, and did not compute.
    """

    tier: str
    provider: str
    queue_ns: int
    compute_ns: int
    total_ns: int
    reused: int = 0


@dataclass(frozen=True)
class LinkUse:
    """What went over the link between two tiers; `network_ns` is what neither of them accounts for."""

    link: str
    bytes_up: int
    bytes_down: int
    network_ns: int


@dataclass(frozen=True)
class Trace:
    """What it took to get the token at `position`.

    The first token of a prompt sums over its `steps` chunks; as these overlap, the sum may be above
    `total_ns`, the time on the clock from the first step sent to the token committed. `tiers` and `links` go
    from the device towards the cloud. `row_digest` is that of the row which predicted the token, as it came
    off the wire. `exact` says that every tier passed its numerics self-test; `resumed` that the session was
    lost and opened again since the token before; `changed` which tiers have another fingerprint since then.
    """

    position: int
    steps: int
    rows: int
    tiers: tuple[TierTime, ...]
    links: tuple[LinkUse, ...]
    total_ns: int
    row_digest: str
    exact: bool
    resumed: bool
    changed: tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """What the device did with one delivery."""

    delivery: Delivery
    provider: str
    queue_ns: int
    compute_ns: int
    done_ns: int


def trace(position: int, row_digest: str, works: Sequence[Work], *, exact: bool) -> Trace:
    """Sums up the deliveries that led to the token at `position`."""
    deliveries = [work.delivery for work in works]
    # From the device towards the cloud; the device's own hop is the wait for its answers.
    hops = [_sum(hop) for hop in zip(*map(_path, deliveries), strict=True)]
    device = TierTime(
        tier="device",
        provider=works[-1].provider,
        queue_ns=sum(work.queue_ns for work in works),
        compute_ns=sum(work.compute_ns for work in works),
        total_ns=sum(work.done_ns - work.delivery.received_ns for work in works),
    )
    others = (
        TierTime(hop.tier, hop.provider, hop.queue_ns, hop.compute_ns, hop.total_ns, hop.reused)
        for hop in hops[1:]
    )
    return Trace(
        position=position,
        steps=len(works),
        rows=sum(delivery.end - delivery.start for delivery in deliveries),
        tiers=(device, *others),
        links=tuple(_link(near, far) for near, far in pairwise(hops)),
        total_ns=works[-1].done_ns - deliveries[0].sent_ns,
        row_digest=row_digest,
        exact=exact,
        resumed=any(delivery.resumed for delivery in deliveries),
        changed=tuple(tier for delivery in deliveries for tier in delivery.changed),
    )


def _path(delivery: Delivery) -> list[pb.Hop]:
    device = pb.Hop(
        tier="device",
        total_ns=delivery.received_ns - delivery.sent_ns,
        bytes_up=delivery.bytes_up,
        bytes_down=delivery.bytes_down,
    )
    return [device, *reversed(delivery.hops)]


def _sum(hops: Sequence[pb.Hop]) -> pb.Hop:
    return pb.Hop(
        tier=hops[-1].tier,
        provider=hops[-1].provider,
        queue_ns=sum(hop.queue_ns for hop in hops),
        compute_ns=sum(hop.compute_ns for hop in hops),
        total_ns=sum(hop.total_ns for hop in hops),
        bytes_up=sum(hop.bytes_up for hop in hops),
        bytes_down=sum(hop.bytes_down for hop in hops),
        reused=sum(hop.reused for hop in hops),
    )


def _link(near: pb.Hop, far: pb.Hop) -> LinkUse:
    network = near.total_ns - near.queue_ns - near.compute_ns - far.total_ns
    return LinkUse(f"{near.tier}-{far.tier}", near.bytes_up, near.bytes_down, max(0, network))
