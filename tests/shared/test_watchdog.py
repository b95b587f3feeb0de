from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trifold.shared.cli.service_process import ServiceProcess
from trifold.shared.session.watchdog import watched


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The end of the socket at which systemd listens, and a second of watchdog."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "1000000")
        yield listening


def waiting(systemd: socket.socket) -> list[bytes]:
    """What has come and was not yet received."""
    systemd.setblocking(False)
    found = []
    while True:
        try:
            found.append(systemd.recv(100))
        except BlockingIOError:
            return found


@pytest.mark.parametrize("tier", ["cloud", "authority"])
def test_systemd_hears_that_a_service_is_ready_and_then_that_it_lives(
    tier: str, systemd: socket.socket, bundle: Path, tmp_path: Path
) -> None:
    command = ["cloud", "serve", str(bundle), "--listen", "127.0.0.1:0"]
    if tier == "authority":
        from trifold.cloud.authority.authority import Authority

        Authority.init(tmp_path / "authority", ["127.0.0.1"])
        command = ["certs", "serve", str(tmp_path / "authority"), "--listen", "127.0.0.1:0"]
        command += ["--listen-nodes", "127.0.0.1:0"]
    with ServiceProcess(command) as service:
        assert [systemd.recv(100) for _ in range(4)] == [b"READY=1", *[b"WATCHDOG=1"] * 3]
        assert service.terminate() == 0


async def test_a_loop_that_hangs_is_not_said_to_live(systemd: socket.socket) -> None:
    async with watched():
        await asyncio.sleep(0.1)
        assert waiting(systemd) == [b"READY=1", b"WATCHDOG=1"]
        time.sleep(1.0)  # noqa: ASYNC251 - hangs
        assert waiting(systemd) == []
        await asyncio.sleep(0.5)
        assert waiting(systemd)
    await asyncio.sleep(0.5)
    assert waiting(systemd) == []


async def test_the_watchdog_of_another_process_is_left_alone(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_PID", "1")
    async with watched():
        await asyncio.sleep(0.5)
        assert waiting(systemd) == [b"READY=1"]


async def test_an_address_that_is_no_file_is_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"trifold-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        async with watched():
            assert waiting(listening) == [b"READY=1"]


async def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    async with watched():
        assert len(asyncio.all_tasks()) == 1
