"""The roster: which site answers at which of Flower's nodes, and whether it holds the same model."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Final

from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from trifold.cloud.federation.exchange import Record, ask
from trifold.shared.errors import InvalidRequest, Unavailable
from trifold.shared.federation.packing import Arrays, size, unpack

SITE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FACTOR: Final = re.compile(r"[A-Za-z0-9_.]{1,256}")

_POLL: Final = 0.5
"""Seconds between looking for sites."""

_PATIENCE: Final = 60.0
"""Seconds that a site has to describe itself: until then the others wait for it."""

Refused = Callable[[str, str], None]
"""Told of a site and why it was refused."""


@dataclass(frozen=True)
class Description:
    """What a site says of itself: its name, the bundle it holds and the factors that training begins with."""

    site: str
    serving_digest: str
    shapes: dict[str, tuple[int, ...]]
    packed: bytes

    @property
    def model(self) -> dict[str, str]:
        """What must be the same at all sites."""
        initial = hashlib.sha256(self.packed).hexdigest()
        return {"serving_digest": self.serving_digest, "initial": initial}

    @property
    def factors(self) -> Arrays:
        """Raises InvalidRequest when the bytes are not those of the shapes."""
        return unpack(self.packed, self.shapes, "fp32")


class Roster:
    """The sites that are there now. `model` is None until the run has settled what its sites must hold.

    A name belongs to the node that had it first, as long as that is online. Where nodes authenticate
    themselves, the name is the one that the node was registered under; what it calls itself does not count.
    """

    def __init__(
        self, grid: Grid, question: Record, refused: Refused, *, deadline: float, model: dict[str, str] | None
    ) -> None:
        self._grid = grid
        self._question = question
        self._refused = refused
        self._deadline = deadline
        self._model = model
        self._described: dict[int, Description | None] = {}
        self._told: dict[str, str] = {}

    def sites(self) -> dict[str, int]:
        """Node ids by site, of all that are online and hold the right model; asks those that are new."""
        self._meet()
        online: dict[str, int] = {}
        for node, description in self._described.items():
            if description is None or description.site in online:
                continue
            if self._model is None or description.model == self._model:
                online[description.site] = node
        return dict(sorted(online.items()))

    def wait(self, count: int) -> dict[str, int]:
        """As soon as there are `count` of them. Raises Unavailable when the deadline passes before."""
        until = time.monotonic() + self._deadline
        while len(sites := self.sites()) < count:
            if time.monotonic() >= until:
                there = ", ".join(sites) or "none"
                raise Unavailable(
                    f"waited {self._deadline:g} s for {count} sites, and there are: {there}. Start the "
                    "others and resume the run"
                )
            time.sleep(_POLL)
        return sites

    def settle(self) -> tuple[dict[str, str], Arrays]:
        """The model that most sites hold, and its factors; the run is about that one from now on."""
        known = [description for description in self._described.values() if description]
        votes = Counter(tuple(sorted(description.model.items())) for description in known)
        self._model = dict(votes.most_common(1)[0][0])
        for description in known:
            self._compare(description)
        chosen = next(description for description in known if description.model == self._model)
        return self._model, chosen.factors

    def _meet(self) -> None:
        nodes = {node.node_id: node for node in self._grid.get_nodes()}
        self._described = {node: known for node, known in self._described.items() if node in nodes}
        new = [node for node in nodes if node not in self._described]
        patience = min(_PATIENCE, self._deadline)
        answers = ask(self._grid, "query.describe", dict.fromkeys(new, self._question), deadline=patience)
        for node, record in sorted(answers.records.items()):
            self._described[node] = self._admitted(nodes[node], record)
        for node, reason in answers.lost.items():
            self._refuse(_name(nodes[node]), reason)

    def _admitted(self, node: NodeInfo, record: Record) -> Description | None:
        try:
            description = _description(record, node)
        except InvalidRequest as error:
            self._refuse(_name(node), error.message)
            return None
        if any(other and other.site == description.site for other in self._described.values()):
            self._refuse(description.site, f"node {node.node_id} has the name of a site that is online")
        if self._model is not None:
            self._compare(description)
        return description

    def _compare(self, description: Description) -> None:
        for what, wanted in (self._model or {}).items():
            if description.model[what] != wanted:
                mine = description.model[what][:12]
                self._refuse(description.site, f"its {what} is {mine}, the run's is {wanted[:12]}")

    def _refuse(self, site: str, reason: str) -> None:
        """Tells it once, however often the site is asked again."""
        if self._told.get(site) != reason:
            self._told[site] = reason
            self._refused(site, reason)


def _name(node: NodeInfo) -> str:
    return str(node.name) if node.HasField("name") and node.name else f"node {node.node_id}"


def _description(record: Record, node: NodeInfo) -> Description:
    """Raises InvalidRequest naming what makes no sense in a site's answer."""
    registered = node.name if node.HasField("name") else ""
    site = registered or record.get("site")
    digest, packed = record.get("serving_digest"), record.get("data")
    if not isinstance(site, str) or not SITE.fullmatch(site):
        raise InvalidRequest("its name is none: letters, digits, '.', '_' and '-', 64 at most")
    if not isinstance(digest, str) or not isinstance(packed, bytes):
        raise InvalidRequest("its description lacks the serving digest or the factors")
    shapes = _shapes(record.get("shapes"))
    if len(packed) != size(shapes, "fp32"):
        raise InvalidRequest(f"its factors have {len(packed)} bytes instead of {size(shapes, 'fp32')}")
    description = Description(site, digest, shapes, packed)
    if any(
        abs(array).max(initial=0) > 1e6 or (array != array).any() for array in description.factors.values()
    ):
        raise InvalidRequest("its initial factors are not finite or beyond 1e6")
    return description


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
