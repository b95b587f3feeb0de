"""The roster: which site answers at which of Flower's nodes, and whether it holds the same model."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from trifold.cloud.federation.description import Description, described, name
from trifold.cloud.federation.exchange import Question, Record
from trifold.shared.errors import InvalidRequest, Unavailable
from trifold.shared.federation.packing import Arrays

_POLL: Final = 0.2
"""Seconds between looking for sites."""

_GLANCE: Final = 5.0
"""Seconds between that while a round goes on."""

_PATIENCE: Final = 60.0
"""Seconds that a site has to describe itself, and to come back for the next round."""

_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 60.0
"""Seconds until a node that gave no good description is asked again; each time twice as many as before."""

Refused = Callable[[str, str], None]
"""Told of a site and why it was refused."""

Sites = dict[str, int]
"""Node ids by the names of sites."""


class Roster:
    """The sites that are there now. `model` is None until the run has settled what its sites must hold.

    A name belongs to the newest node that answers to it: a site that was killed and started again is a new
    node, while Flower lists the old one for up to a minute. Nodes whose description is of no use are asked
    again at growing intervals, for the site behind one may mend its bundle or start its trainer; no round
    waits for them.
    """

    def __init__(
        self,
        grid: Grid,
        question: Record,
        refused: Refused,
        *,
        count: int,
        deadline: float,
        model: dict[str, str] | None,
    ) -> None:
        """`count` sites are expected at first, within `deadline` seconds; `question` is put to every node."""
        self._grid = grid
        self._question = question
        self._refused = refused
        self._count = count
        self._deadline = deadline
        self._model = model
        self._expected: frozenset[str] | None = None
        self._known: dict[int, Description] = {}
        self._asked: dict[int, Question] = {}
        self._pauses: dict[int, tuple[float, float]] = {}
        self._initial: dict[str, Arrays] = {}
        self._told: dict[str, str] = {}
        self._looked = 0.0

    def sites(self) -> Sites:
        """All that are online and hold the right model. Asks those that are new, and waits for none."""
        self._looked = time.monotonic()
        nodes = {node.node_id: node for node in self._grid.get_nodes()}
        for remembered in (self._known, self._asked, self._pauses):
            for gone in remembered.keys() - nodes.keys():
                del remembered[gone]
        for node in sorted(nodes.keys() - self._known.keys() - self._asked.keys()):
            due, _ = self._pauses.get(node, (0.0, 0.0))
            if time.monotonic() >= due:
                self._asked[node] = self._describe(node)
        for node in [node for node, question in self._asked.items() if question.over()]:
            self._meet(nodes[node], self._asked.pop(node))
        return dict(sorted((known.site, node) for node, known in self._known.items()))

    def settle(self) -> tuple[dict[str, str], Arrays]:
        """The model that most sites hold, and its factors; the run is about that one from now on.

        Raises Unavailable when not all that are expected come in time.
        """
        if len(there := self._wait(self._all)) < self._count:
            raise self._missing(self._count, there)
        votes = Counter(tuple(sorted(known.model.items())) for known in self._known.values())
        self._model = dict(votes.most_common(1)[0][0])
        for node, known in list(self._known.items()):
            try:
                self._compare(known)
            except InvalidRequest as error:
                self._drop(node, known.site, error.message)
        self._expected = frozenset(known.site for known in self._known.values())
        factors = self._initial[self._model["initial"]]
        self._initial.clear()
        return self._model, factors

    def gather(self, quorum: int) -> Sites:
        """The sites for a round: all that are expected, or after a while those that have come.

        The first round of a process expects as many as the run began with, within the deadline: at a resume
        they may all be on their way. A later one expects those of the round before, within a minute: who has
        left for good is waited for once. Raises Unavailable when not even `quorum` sites come in time.
        """
        if self._expected is None:
            sites = self._wait(self._all)
        else:
            sites = self._wait(self._back, min(_PATIENCE, self._deadline))
            if len(sites) < quorum:
                sites = self._wait(lambda there: len(there) >= quorum)
        if len(sites) < quorum:
            raise self._missing(quorum, sites)
        self._expected = frozenset(sites)
        return sites

    def glance(self) -> None:
        """Meets those that come while a round goes on, so that they are known for the next."""
        if time.monotonic() >= self._looked + _GLANCE:
            self.sites()

    def forget(self, node: int) -> None:
        """It was lost in a round: it takes part again when it has described itself again."""
        self._known.pop(node, None)

    def _all(self, there: Sites) -> bool:
        """Nodes that are online may hold another model than the first to answer: none is left out."""
        return len(there) >= self._count and not self._asked

    def _back(self, there: Sites) -> bool:
        return (self._expected or frozenset()) <= there.keys()

    def _wait(self, enough: Callable[[Sites], bool], seconds: float | None = None) -> Sites:
        """The sites as soon as they are enough, or those that are there when the deadline has passed."""
        until = time.monotonic() + (self._deadline if seconds is None else seconds)
        while not enough(sites := self.sites()) and time.monotonic() < until:
            time.sleep(_POLL)
        return sites

    def _missing(self, count: int, there: Sites) -> Unavailable:
        return Unavailable(
            f"waited {self._deadline:g} s for {count} sites, and there are: {', '.join(there) or 'none'}. "
            "Start the others and resume the run"
        )

    def _describe(self, node: int) -> Question:
        patience = min(_PATIENCE, self._deadline)
        return Question(self._grid, "query.describe", node, self._question, deadline=patience)

    def _meet(self, node: NodeInfo, question: Question) -> None:
        """Takes its description, or says what is wrong with it, and asks again later."""
        site = name(node)
        try:
            if question.record is None:
                raise InvalidRequest(question.lost)
            description, factors = described(question.record, node)
            site = description.site
            self._admit(node.node_id, description)
        except InvalidRequest as error:
            self._drop(node.node_id, site, error.message)
            return
        if self._model is None:
            self._initial.setdefault(description.model["initial"], factors)

    def _admit(self, node: int, description: Description) -> None:
        """Raises InvalidRequest when it holds another model, or has the name of a newer node."""
        self._compare(description)
        for other, known in list(self._known.items()):
            if known.site == description.site:
                if known.since > description.since:
                    raise InvalidRequest(f"node {node} has the name of a newer node that is online")
                del self._known[other]
                self._postpone(other)
        self._known[node] = description
        self._pauses.pop(node, None)

    def _compare(self, description: Description) -> None:
        """Raises InvalidRequest when the run is about another model."""
        for what, wanted in (self._model or {}).items():
            mine = description.model[what]
            if mine != wanted:
                raise InvalidRequest(f"its {what} is {mine[:12]}, the run's is {wanted[:12]}")

    def _drop(self, node: int, site: str, reason: str) -> None:
        """Tells the reason once, however often the node is asked again."""
        self._known.pop(node, None)
        self._postpone(node)
        if self._told.get(site) != reason:
            self._told[site] = reason
            self._refused(site, reason)

    def _postpone(self, node: int) -> None:
        _, pause = self._pauses.get(node, (0.0, _PAUSE / 2))
        pause = min(_LONGEST_PAUSE, 2 * pause)
        self._pauses[node] = time.monotonic() + pause, pause
