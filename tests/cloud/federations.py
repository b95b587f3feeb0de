"""Federations in one process: sites that learn numbers instead of text, behind Flower's Grid."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from trifold.cloud.federation.checkpoint import Checkpoint
from trifold.cloud.federation.exchange import RECORD, Record
from trifold.cloud.federation.folder import RunFolder
from trifold.cloud.federation.metrics import Event, read
from trifold.cloud.federation.run import FederatedRun
from trifold.cloud.federation.settings import RunSettings
from trifold.shared.federation.feedback import ErrorFeedback
from trifold.shared.federation.packing import Arrays, pack, shapes_of, unpack

SHAPES = {"m.q_proj.lora_A": (4, 24), "m.q_proj.lora_B": (16, 4)}


def drawn(seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


INITIAL = drawn(0)


class Site:
    """Steps half of the way to factors of its own in each round; the wire and the disk are the real ones.

    `spoil` changes the answer to a round, as bad sites do. `rounds` are those that it has computed.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        digest: str = "d" * 64,
        spoil: Callable[[Record], Record] | None = None,
    ) -> None:
        self.name = name
        self.rounds: list[int] = []
        self._folder = folder
        self._digest = digest
        self._spoil = spoil
        self._goal = drawn(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little"))

    def answer(self, action: str, request: Record) -> Record:
        if action == "query.describe":
            described = {"site": self.name, "serving_digest": self._digest, "shapes": json.dumps(SHAPES)}
            return described | {"data": pack(INITIAL, "fp32")}
        base = unpack(request["data"], SHAPES, "fp32")
        if action == "evaluate":
            return {"heldout": self._loss(base), "seconds": 0.0}
        feedback = ErrorFeedback(self._folder, request["run"], self.name)
        feedback.settle(request["acknowledged"])
        proposal = feedback.proposed(request["round"], request["base"])
        if proposal is None:
            self.rounds.append(request["round"])
            update = {name: (self._goal[name] - array) * np.float32(0.5) for name, array in base.items()}
            told = {"heldout": self._loss(base), "loss": self._loss(base)}
            proposal = feedback.propose(request["round"], request["base"], update, request["update"], told)
        answer = proposal.report | {"data": proposal.data, "seconds": 0.0}
        return self._spoil(answer) if self._spoil else answer

    def _loss(self, factors: Arrays) -> float:
        return float(sum(np.square(factors[name] - goal).mean() for name, goal in self._goal.items()))


class Stopped(BaseException):
    """As a kill would."""


class LocalGrid(Grid):
    """A Grid whose nodes are objects. Those named in `silent` take messages and never answer, for those in
    `broken` Flower answers with an error, and what those in `garbled` answer is nothing that Flower can read.
    Nodes came online in the order of their ids. The server is Stopped at the first message of the round
    `stop_at`.
    """

    def __init__(self, *sites: Site, silent: Iterable[str] = (), broken: Iterable[str] = ()) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.nodes = dict(enumerate(sites, start=100))
        self.silent = set(silent)
        self.broken = set(broken)
        self.garbled: set[str] = set()
        self.registered: dict[int, str] = {}
        self.stop_at = 0
        self._replies: dict[str, Message | None] = {}

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [
            NodeInfo(node_id=node, name=self.registered.get(node), last_activated_at=f"{node:06}")
            for node in self.nodes
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = [self._replies.pop(number) for number in message_ids if number in self._replies]
        if not all(replies):
            raise KeyError("no such object")
        return [reply for reply in replies if reply]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Any:
        raise NotImplementedError

    def _push(self, message: Message) -> str:
        number, site = str(uuid4()), self.nodes[message.metadata.dst_node_id]
        message.metadata.__dict__["_message_id"] = number
        request = dict(message.content.config_records[RECORD])
        if self.stop_at == request.get("round"):
            raise Stopped
        if site.name in self.broken:
            self._replies[number] = Message(Error(1, "the process ended"), reply_to=message)
        elif site.name in self.garbled:
            self._replies[number] = None
        elif site.name not in self.silent:
            answer = site.answer(message.metadata.message_type, request)
            content = RecordDict({RECORD: ConfigRecord(answer)})
            self._replies[number] = Message(content, reply_to=message)
        return number


def sites(folder: Path, *names: str) -> list[Site]:
    return [Site(name, folder) for name in names or ("clinic", "press", "school")]


def begin(folder: Path, **settings: Any) -> RunFolder:
    defaults: dict[str, Any] = {"rounds": 4, "sites": 3, "quorum": 2, "deadline": 5.0, "attempts": 1}
    return RunFolder.create(folder, RunSettings.checked(defaults | settings))


def run(folder: RunFolder, grid: Grid) -> Checkpoint:
    return FederatedRun(folder, grid).run()


def events(folder: RunFolder, kind: str) -> list[Event]:
    return [event for event in read(folder.path) if event["event"] == kind]


def equal(one: Arrays, other: Arrays) -> bool:
    """To the last bit."""
    return shapes_of(one) == shapes_of(other) and all(one[n].tobytes() == other[n].tobytes() for n in one)
