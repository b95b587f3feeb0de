"""What a site says of itself, checked before anything is made of it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from math import prod
from typing import Final

from flwr.proto.node_pb2 import NodeInfo

from trifold.cloud.federation.exchange import Record
from trifold.shared.errors import InvalidRequest
from trifold.shared.federation.packing import Arrays, size, unpack
from trifold.shared.identity.name import NAME, NAME_RULE

_FACTOR: Final = re.compile(r"[A-Za-z0-9_.]{1,256}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Description:
    """A site's name, and by digests the bundle and the first factors that it holds.

    `since` orders nodes by when they came online, each in a place of its own.
    """

    site: str
    model: dict[str, str]
    since: tuple[str, int]


def name(node: NodeInfo) -> str:
    """What to call a node whose site is not known: the name that it was registered under, if any."""
    return node.name or f"node {node.node_id}"


def described(record: Record, node: NodeInfo) -> tuple[Description, Arrays]:
    """What a node's answer says, and the factors that training begins with.

    Where nodes authenticate themselves, the site's name is the one that the node was registered under. Raises
    InvalidRequest naming what makes no sense.
    """
    site = node.name or record.get("site")
    digest, packed = record.get("serving_digest"), record.get("data")
    if not isinstance(site, str) or not NAME.fullmatch(site):
        raise InvalidRequest(f"its name is none: {NAME_RULE}")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest) or not isinstance(packed, bytes):
        raise InvalidRequest("its description lacks the serving digest or the factors")
    shapes = _shapes(record.get("shapes"))
    if len(packed) != size(shapes, "fp32"):
        raise InvalidRequest(f"its factors have {len(packed)} bytes instead of {size(shapes, 'fp32')}")
    factors = unpack(packed, shapes, "fp32")
    if any(abs(array).max(initial=0) > 1e6 or (array != array).any() for array in factors.values()):
        raise InvalidRequest("its initial factors are not finite or beyond 1e6")
    model = {"serving_digest": digest, "initial": hashlib.sha256(packed).hexdigest()}
    return Description(site, model, (node.last_activated_at, node.node_id)), factors


def _shapes(text: object) -> dict[str, tuple[int, ...]]:
    try:
        shapes = {str(name): tuple(shape) for name, shape in json.loads(str(text)).items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise InvalidRequest("its shapes are not JSON") from None
    for name, shape in shapes.items():
        sound = all(type(side) is int and side > 0 for side in shape) and len(shape) == 2
        if not _FACTOR.fullmatch(name) or not sound or prod(shape) > 2**31:
            raise InvalidRequest(f"its factor {name[:80]!r} cannot have the shape {str(shape)[:80]}")
    if not shapes:
        raise InvalidRequest("it has no factors to train: do the LoRA tiers have layers?")
    return shapes
