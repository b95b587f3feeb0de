"""Messages to sites and their answers, over Flower's Grid: no dead or slow site holds them up for ever."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from trifold.cloud.federation.pace import wait_at_most
from trifold.shared.errors import InvalidRequest

Action = Literal["query.describe", "train", "evaluate"]
Record = dict[str, Any]
"""What a message carries: numbers, text, and bytes."""

RECORD: Final = "trifold"
"""The one record in a message: every further one would cost requests of its own."""

_POLL: Final = 0.1
"""Seconds between looking for answers. Flower's send_and_receive waits 3."""

_REST: Final = 3
"""The pause between looks in times of what a look took: many sites do not keep the SuperLink busy."""

_MOST: Final = 1e15
"""More bytes, seconds or nats than any site can tell of."""

_LATE: Final = 60.0
"""Seconds that Flower keeps an answer beyond the deadline: one that came in time may be looked at late."""

_WORDS: Final = 300
"""Characters of what a site says that are kept."""


class Question:
    """A request on its way to a node. Once it is `over`, it has a `record`, or was `lost` and says why."""

    def __init__(
        self, grid: Grid, action: Action, node: int, request: Record, *, deadline: float, group: str = ""
    ) -> None:
        """It expires some time after the deadline: a site that is back late does not work for nothing."""
        self.record: Record | None = None
        self.lost = ""
        self._grid = grid
        self._deadline = deadline
        content = RecordDict({RECORD: ConfigRecord(request)})
        message = Message(
            content, dst_node_id=node, message_type=action, ttl=deadline + _LATE, group_id=group
        )
        self._number = next(iter(grid.push_messages([message])), None)
        self._until = time.monotonic() + deadline
        if not self._number:
            self.lost = "Flower did not take the message"

    def over(self) -> bool:
        """Looks for the answer. Whatever is wrong with it loses this question, and nothing else."""
        if self.record is None and not self.lost:
            try:
                self._look()
            except InvalidRequest as error:
                self.lost = _plain(error.message)
            except Exception as error:  # Flower reads what the site sent: it may fail in any way.
                self.lost = _plain(f"its answer cannot be read: {type(error).__name__}: {error}")
        return self.record is not None or bool(self.lost)

    def _look(self) -> None:
        wait_at_most(self._until - time.monotonic())
        # One message at a time: whose answer it is does not depend on what the answer says, and Flower, which
        # hands out an answer once, loses no other when it cannot read this one.
        for reply in self._grid.pull_messages([self._number or ""]):
            self.record = _record(reply)
            return
        if time.monotonic() >= self._until:
            self.lost = f"no answer within {self._deadline:g} s"


@dataclass
class Answers:
    """What came back, by node: the records of some, of others why there is none."""

    records: dict[int, Record] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)


def ask(
    grid: Grid,
    action: Action,
    requests: Mapping[int, Record],
    *,
    deadline: float,
    group: str = "",
    answered: Callable[[int, Record], None] = lambda node, record: None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Answers:
    """Send each node its request, and wait until all have answered or `deadline` seconds are over.

    A node that is lost on the way counts as answered as soon as Flower knows; an answer that comes too late
    is never looked at. `answered` is told of each answer as it comes, `meanwhile` is called between looks.
    """
    answers = Answers()
    waiting = {
        node: Question(grid, action, node, request, deadline=deadline, group=group)
        for node, request in requests.items()
    }
    while waiting:
        began = time.monotonic()
        for node in [node for node, question in waiting.items() if question.over()]:
            question = waiting.pop(node)
            if question.record is None:
                answers.lost[node] = question.lost
            else:
                answers.records[node] = question.record
                answered(node, question.record)
        if waiting:
            meanwhile()
            time.sleep(max(_POLL, _REST * (time.monotonic() - began)))
    return answers


def _record(reply: Message) -> Record:
    """Raises InvalidRequest with what a site sent instead of one record of ours."""
    if reply.has_error():
        raise InvalidRequest(reply.error.reason or f"Flower error {reply.error.code}")
    records = reply.content
    if list(records) != [RECORD] or not isinstance(records[RECORD], ConfigRecord):
        raise InvalidRequest(f"the answer holds {', '.join(map(str, records)) or 'nothing'}, not {RECORD}")
    record = dict(records[RECORD])
    if "refusal" in record:
        raise InvalidRequest(str(record["refusal"]))
    for name, value in record.items():
        if name == "data" and type(value) is not bytes:
            raise InvalidRequest(f"its data is {type(value).__name__}, not bytes")
        if isinstance(value, int | float) and not 0 <= value <= _MOST:
            raise InvalidRequest(f"its {name} cannot be {value:g}")
    return record


def _plain(words: str) -> str:
    """What a site says, as one line that logs, tables and terminals can take."""
    line = "".join(letter if letter.isprintable() else " " for letter in words[:_WORDS])
    return " ".join(line.split()) + (" …" if len(words) > _WORDS else "") or "no reason given"
