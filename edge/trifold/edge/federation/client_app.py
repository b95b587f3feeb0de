"""The ClientApp: relays Flower's messages to the site's resident trainer.

Flower starts a process for every message. This one imports neither torch nor transformers, and holds nothing.
The node config names the trainer's socket; in Flower's simulation, where all nodes are alike, the run config
does, and the partition says which of the trainer's sites a node stands for.
"""

from __future__ import annotations

from typing import Final

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from trifold.edge.federation.frames import Record, ask
from trifold.shared.errors import InvalidRequest, TrifoldError

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
    socket = str(context.node_config.get("trainer") or context.run_config.get("trainer") or "")
    request: Record = dict(message.content.config_records[RECORD]) | {"action": action}
    if "partition-id" in context.node_config:
        request["partition"] = int(context.node_config["partition-id"])
    try:
        answer = ask(socket, request, patience=_PATIENCE[action])
        _check_size(answer, request)
    except TrifoldError as error:
        answer = {"refusal": error.message}
    return Message(RecordDict({RECORD: ConfigRecord(answer)}), reply_to=message)


def _check_size(answer: Record, request: Record) -> None:
    """Raises InvalidRequest for an update that no trainer of ours makes, before Flower carries it."""
    size, most = len(answer.get("data", b"")), len(request.get("data", b""))
    if request["action"] != "describe" and size > most:
        raise InvalidRequest(f"the update has {size} bytes, the factors that it changes have {most}")
