from __future__ import annotations

import os
import socket as sockets
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from multiprocessing.connection import Client
from pathlib import Path

import pytest

from trifold.edge.federation.frames import ask
from trifold.edge.federation.resident import serve
from trifold.shared.errors import ConfigError, Unavailable

ECHO = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from trifold.edge.federation.resident import serve
    from trifold.shared.errors import InvalidRequest

    def answer(request):
        if request.get("bad") == "typed":
            raise InvalidRequest("there is no such round")
        if request.get("bad") == "bug":
            raise ValueError("text of the site")
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
    refusal = ask(str(trainer.socket), {"bad": "bug"}, patience=5)["refusal"]
    assert refusal.startswith("internal error ")
    assert "text of the site" not in refusal


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


def test_a_trainer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"trainer at .*none\.sock is not there: is `trifold edge train`"):
        ask(str(tmp_path / "none.sock"), {}, patience=0.1)


def test_a_socket_that_is_taken_or_too_long_is_refused(trainer: Trainer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another trainer listens here"):
        serve(trainer.socket, lambda record: record)
    with pytest.raises(ConfigError, match="at most 107 bytes"):
        serve(tmp_path / ("x" * 120), lambda record: record)


def test_relaying_a_message_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, trifold.edge.federation.client_app; "
        "print([name for name in ('torch', 'transformers', 'peft', 'onnxruntime') if name in sys.modules])"
    )
    quiet = os.environ | {"FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=quiet)
    assert done.stdout == "[]\n"
