"""The ClientApp: relays Flower's messages to the site's resident trainer.

Flower starts a process for every message. This one imports neither torch nor transformers, and holds nothing.
The node config names the trainer's socket; in Flower's simulation, where all nodes are alike, the run config
does, and the partition says which of the trainer's sites a node stands for.
"""

from __future__ import annotations

import time
from typing import Final

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from trifold.edge.federation.frames import Record, ask
from trifold.edge.federation.refusal import refusal
from trifold.shared.errors import InvalidRequest

RECORD: Final = "trifold"
"""As in the server's messages: the one record of ours."""

_PATIENCE: Final = {"describe": 5.0, "train": 120.0, "evaluate": 120.0}
"""Seconds to wait for a trainer that is not there: one that was lost in a round may soon be back."""

app = ClientApp()


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """The site's name, its bundle, and the factors that training begins with."""
    return _relay("describe", message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """The site's update of a round."""
    return _relay("train", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The site's held-out loss with the factors of the message."""
    return _relay("evaluate", message, context)


def _relay(action: str, message: Message, context: Context) -> Message:
    try:
        answer = _answer(action, message, context)
    except Exception as error:
        # Flower would tell the server all that an exception says.
        answer = refusal(error)
    return Message(RecordDict({RECORD: ConfigRecord(answer)}), reply_to=message)


def _answer(action: str, message: Message, context: Context) -> Record:
    socket = str(context.node_config.get("trainer") or context.run_config.get("trainer") or "")
    within = _remaining(message)
    request: Record = dict(message.content.config_records[RECORD])
    # A trainer that comes to it later does not train for nothing.
    request |= {"action": action, "expires": time.monotonic() + within}
    if "partition-id" in context.node_config:
        request["partition"] = int(context.node_config["partition-id"])
    answer = ask(socket, request, patience=_PATIENCE[action], within=within)
    _check_size(answer, request)
    return answer


def _remaining(message: Message) -> float:
    """Seconds until nobody waits for the answer; where the site's clock is behind, no more than it had."""
    metadata = message.metadata
    return min(metadata.ttl, metadata.created_at + metadata.ttl - time.time())


def _check_size(answer: Record, request: Record) -> None:
    """Raises InvalidRequest for an update that no trainer of ours makes, before Flower carries it."""
    size, most = len(answer.get("data", b"")), len(request.get("data", b""))
    if request["action"] != "describe" and size > most:
        raise InvalidRequest(f"the update has {size} bytes, the factors that it changes have {most}")
