from __future__ import annotations

import os
import re
import socket as sockets
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Client, Listener
from pathlib import Path

import pytest

from trifold.edge.federation.frames import ask, receive, send
from trifold.edge.federation.refusal import refusal
from trifold.edge.federation.resident import serve
from trifold.shared.errors import ConfigError, DamagedFile, DeadlineExceeded, Unavailable

ECHO = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from trifold.edge.federation.resident import serve
    from trifold.shared.errors import DamagedFile, InvalidRequest

    def answer(request):
        if request.get("bad") == "typed":
            raise InvalidRequest("there is no such round")
        if request.get("bad") == "bug":
            raise ValueError("text of the site")
        if request.get("bad") == "file":
            raise DamagedFile("/home/clinic/pending.safetensors: is not a whole proposal")
        if (flag := request.get("flag")) and not Path(flag).exists():
            Path(flag).touch()
            time.sleep(60)
        return {"twice": 2 * request["number"], "data": request["data"][::-1]}

    serve(Path(sys.argv[1]), answer)
    """
)


class Trainer:
    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", ECHO, str(self.socket)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout
        assert self.process.stdout.readline() == f"trifold trainer ready on {self.socket}\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    running = Trainer(tmp_path / "trainer.sock")
    yield running
    running.kill()


def test_a_record_comes_back_with_its_bytes(trainer: Trainer) -> None:
    answer = ask(str(trainer.socket), {"number": 21, "data": b"abc" * 10**6}, patience=5)
    assert answer == {"twice": 42, "data": b"cba" * 10**6}


def test_only_the_user_reaches_the_socket(trainer: Trainer) -> None:
    assert stat.S_IMODE(trainer.socket.stat().st_mode) & 0o077 == 0


def test_errors_come_back_in_words_and_bugs_as_a_number(trainer: Trainer) -> None:
    assert ask(str(trainer.socket), {"bad": "typed"}, patience=5)["refusal"] == "there is no such round"
    told = ask(str(trainer.socket), {"bad": "bug"}, patience=5)["refusal"]
    assert told.startswith("internal error ")
    assert "text of the site" not in told


def test_what_is_wrong_with_the_sites_own_files_is_told_without_their_paths(trainer: Trainer) -> None:
    told = ask(str(trainer.socket), {"bad": "file"}, patience=5)["refusal"]
    assert re.fullmatch(r"refusal [0-9a-f]{8} \(DAMAGED_FILE\): the log of the trainer has .*", told)


def test_the_number_of_a_refusal_leads_to_what_the_site_logged(caplog: pytest.LogCaptureFixture) -> None:
    told = refusal(DamagedFile("/home/clinic/pending.safetensors: is not whole"))["refusal"]
    assert caplog.messages == [f"refusal {told.split()[1]}: /home/clinic/pending.safetensors: is not whole"]


def test_peers_that_leave_or_talk_nonsense_harm_nobody(trainer: Trainer) -> None:
    for nonsense in (b"", b"{", b"[1]", b"\xff" * 100):
        with Client(str(trainer.socket), "AF_UNIX") as connection:
            connection.send_bytes(nonsense)
    with sockets.socket(sockets.AF_UNIX) as raw:
        raw.connect(str(trainer.socket))
        raw.sendall(b"\x7f\xff\xff\xff")
    assert ask(str(trainer.socket), {"number": 1}, patience=5)["twice"] == 2


def test_a_trainer_killed_at_work_is_asked_again_when_it_is_back(trainer: Trainer, tmp_path: Path) -> None:
    flag = tmp_path / "began"
    asking = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from trifold.edge.federation.frames import ask; "
            "print(ask(sys.argv[1], {'number': 4, 'flag': sys.argv[2]}, patience=30)['twice'])",
            str(trainer.socket),
            str(flag),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    while not flag.exists():
        time.sleep(0.02)
    trainer.kill()
    trainer.start()
    assert asking.communicate(timeout=40)[0] == "8\n"


def test_a_trainer_that_is_not_there_is_named_in_the_log_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    socket = str(tmp_path / "none.sock")
    with pytest.raises(Unavailable, match="trainer is not there: is `trifold edge train` running") as caught:
        ask(socket, {}, patience=0.1)
    assert socket not in caught.value.message
    assert caplog.messages == [f"there is no trainer at {socket}"]


def test_a_trainer_that_a_request_ends_again_and_again_is_asked_no_more(tmp_path: Path) -> None:
    socket, losses = str(tmp_path / "trainer.sock"), 0

    def lose() -> None:
        nonlocal losses
        while receive(connection := listener.accept())["action"] == "train":
            losses += 1
            connection.close()
        connection.close()

    with Listener(socket, "AF_UNIX") as listener:
        losing = threading.Thread(target=lose)
        losing.start()
        with pytest.raises(Unavailable, match="lost 3 times at this request: its log may say why"):
            ask(socket, {"action": "train"}, patience=60)
        with Client(socket, "AF_UNIX") as connection:
            send(connection, {"action": "leave"})
            losing.join()
    assert losses == 3


@pytest.mark.parametrize("size", [0, 10**7], ids=["small", "more than the socket holds"])
def test_a_trainer_at_work_is_waited_for_no_longer_than_there_is_time(
    trainer: Trainer, tmp_path: Path, size: int
) -> None:
    flag = tmp_path / "began"
    with pytest.raises(DeadlineExceeded, match="trainer is not done"):
        ask(str(trainer.socket), {"number": 1, "flag": str(flag)}, patience=60, within=0.5)
    assert flag.exists()
    # It still works on that one.
    with pytest.raises(DeadlineExceeded, match="trainer is not done"):
        ask(str(trainer.socket), {"number": 1, "data": bytes(size)}, patience=60, within=0.5)


def test_a_socket_that_is_taken_or_too_long_is_refused(trainer: Trainer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another trainer listens here"):
        serve(trainer.socket, lambda record: record)
    with pytest.raises(ConfigError, match="at most 107 bytes"):
        serve(tmp_path / ("x" * 120), lambda record: record)


def test_a_file_in_the_place_of_the_socket_is_left_alone(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("of years")
    with pytest.raises(ConfigError, match=r"notes\.txt is no socket"):
        serve(notes, lambda record: record)
    assert notes.read_text() == "of years"


def test_relaying_a_message_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, trifold.edge.federation.client_app; "
        "print([name for name in ('torch', 'transformers', 'peft', 'onnxruntime') if name in sys.modules])"
    )
    quiet = os.environ | {"FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=quiet)
    assert done.stdout == "[]\n"
