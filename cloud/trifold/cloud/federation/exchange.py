"""Messages to sites and their answers, over Flower's Grid: no dead or slow site holds them up for ever."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from trifold.shared.errors import InvalidRequest

Action = Literal["query.describe", "train", "evaluate"]
Record = dict[str, Any]
"""What a message carries: numbers, text, and bytes."""

RECORD: Final = "trifold"
"""The one record in a message: every further one would cost requests of its own."""

_POLL: Final = 0.1
"""Seconds between looking for answers. Flower's send_and_receive waits 3."""


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
    answered: Callable[[int, Record], None] | None = None,
) -> Answers:
    """Send each node its request, and wait until all have answered or `deadline` seconds are over.

    A node that is lost on the way counts as answered as soon as Flower knows; an answer that comes too late
    is never looked at. `answered` is told of each answer as it comes.
    """
    answers, until = Answers(), time.monotonic() + deadline
    messages = [_message(action, node, record, deadline, group) for node, record in requests.items()]
    sent = dict(zip(grid.push_messages(messages), requests, strict=True)) if messages else {}
    waiting = {message: node for message, node in sent.items() if message}
    answers.lost = dict.fromkeys(set(requests) - set(waiting.values()), "Flower did not take the message")
    while waiting:
        for reply in grid.pull_messages(list(waiting)):
            node = waiting.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                _note(answers, node, reply, answered)
        if waiting and time.monotonic() >= until:
            answers.lost |= dict.fromkeys(waiting.values(), f"no answer within {deadline:g} s")
            break
        if waiting:
            time.sleep(_POLL)
    return answers


def _message(action: Action, node: int, record: Record, deadline: float, group: str) -> Message:
    """It expires with the deadline, so that a site that comes back late does not train for nothing."""
    content = RecordDict({RECORD: ConfigRecord(record)})
    return Message(content, dst_node_id=node, message_type=action, ttl=deadline, group_id=group)


def _note(
    answers: Answers, node: int, reply: Message, answered: Callable[[int, Record], None] | None
) -> None:
    if reply.has_error():
        answers.lost[node] = reply.error.reason or f"Flower error {reply.error.code}"
        return
    try:
        record = _record(reply)
    except InvalidRequest as error:
        answers.lost[node] = error.message
        return
    if "refusal" in record:
        answers.lost[node] = str(record["refusal"])
        return
    answers.records[node] = record
    if answered:
        answered(node, record)


def _record(reply: Message) -> Record:
    """Raises InvalidRequest when a site sent something else than one record of ours."""
    records = reply.content
    if list(records) != [RECORD] or not isinstance(records[RECORD], ConfigRecord):
        raise InvalidRequest(f"the answer holds {', '.join(map(str, records)) or 'nothing'}, not {RECORD}")
    return dict(records[RECORD])
