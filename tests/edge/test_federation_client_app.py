from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Listener
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from trifold.edge.federation.client_app import RECORD, app
from trifold.edge.federation.frames import Record, receive, send


@contextmanager
def trainer(socket: Path, answer: Record) -> Iterator[Record]:
    """A trainer that has this answer to one request, and what it was asked."""
    asked: Record = {}
    with Listener(str(socket), "AF_UNIX") as listener:

        def serve() -> None:
            with listener.accept() as connection:
                asked.update(receive(connection))
                send(connection, answer)

        serving = threading.Thread(target=serve)
        serving.start()
        yield asked
        serving.join()


def relayed(socket: Path, action: str, request: Record, *, record: str = RECORD, ttl: float = 60.0) -> Record:
    """What the ClientApp replies to a message of the server."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    content = RecordDict({record: ConfigRecord(request)})
    message = Message(content, dst_node_id=7, message_type=action, ttl=ttl)
    context = Context(1, 7, {"trainer": str(socket)}, RecordDict(), {})
    return dict(app(message, context).content.config_records[RECORD])


@pytest.mark.parametrize("action", ["train", "evaluate"])
def test_an_update_larger_than_the_factors_does_not_leave_the_site(tmp_path: Path, action: str) -> None:
    socket = tmp_path / "trainer.sock"
    with trainer(socket, {"loss": 2.5, "data": bytes(1000)}):
        answer = relayed(socket, action, {"round": 1, "data": bytes(1000)})
        assert answer == {"loss": 2.5, "data": bytes(1000)}
    socket.unlink(missing_ok=True)
    with trainer(socket, {"loss": 2.5, "data": bytes(1001)}):
        answer = relayed(socket, action, {"round": 1, "data": bytes(1000)})
        assert answer == {"refusal": "the update has 1001 bytes, the factors that it changes have 1000"}


def test_a_site_describes_itself_with_factors_that_nobody_sent_it(tmp_path: Path) -> None:
    socket = tmp_path / "trainer.sock"
    with trainer(socket, {"site": "clinic", "data": bytes(1000)}):
        assert relayed(socket, "query.describe", {"lora": "{}"}) == {"site": "clinic", "data": bytes(1000)}


def test_a_trainer_learns_how_long_the_server_waits(tmp_path: Path) -> None:
    socket, began = tmp_path / "trainer.sock", time.monotonic()
    with trainer(socket, {"loss": 2.5, "data": b""}) as asked:
        relayed(socket, "train", {"round": 1, "expires": 1e9, "data": b""}, ttl=30.0)
    assert began + 29 < asked["expires"] <= time.monotonic() + 30


def test_a_trainer_is_waited_for_only_while_the_server_waits(tmp_path: Path) -> None:
    answer = relayed(tmp_path / "none.sock", "train", {"round": 1, "data": b""}, ttl=0.3)
    assert answer == {"refusal": "the site's trainer is not there: is `trifold edge train` running?"}


def test_an_error_that_nobody_expected_is_a_number_to_the_server(tmp_path: Path) -> None:
    told = relayed(tmp_path / "none.sock", "train", {"round": 1}, record="another")["refusal"]
    assert told.startswith("internal error ")
    assert "another" not in told
