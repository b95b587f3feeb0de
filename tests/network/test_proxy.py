from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from time import perf_counter

import pytest

from tests.network.proxy import Proxy


@pytest.fixture
async def echo() -> AsyncIterator[str]:
    """The address of a server that sends everything back."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


class Peer:
    """A client of the echo."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, address: str) -> Peer:
        host, _, port = address.rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def ask(self, data: bytes) -> bytes:
        self.writer.write(data)
        async with asyncio.timeout(20):
            return await self.reader.readexactly(len(data))


async def test_bytes_pass_unchanged_and_are_counted(echo: str) -> None:
    data = bytes(range(256)) * 4096
    async with Proxy(echo) as proxy:
        peer = await Peer.connect(proxy.address)
        assert await peer.ask(data) == data
        assert (proxy.bytes_up, proxy.bytes_down) == (len(data), len(data))
        peer.writer.close()


async def test_a_delay_is_paid_in_each_direction(echo: str) -> None:
    async with Proxy(echo, delay=0.1) as proxy:
        peer = await Peer.connect(proxy.address)
        begun = perf_counter()
        await peer.ask(bytes(200_000))
        assert perf_counter() - begun >= 0.2
        peer.writer.close()


async def test_a_narrow_link_takes_its_time(echo: str) -> None:
    async with Proxy(echo, bandwidth=100_000) as proxy:
        peer = await Peer.connect(proxy.address)
        begun = perf_counter()
        await peer.ask(bytes(40_000))
        assert perf_counter() - begun >= 0.4
        peer.writer.close()


async def test_a_stalled_link_passes_nothing_until_it_flows_again(echo: str) -> None:
    async with Proxy(echo) as proxy:
        peer = await Peer.connect(proxy.address)
        await peer.ask(b"before")
        proxy.stall()
        waiting = asyncio.create_task(peer.ask(b"during"))
        done, _ = await asyncio.wait([waiting], timeout=0.2)
        assert not done
        proxy.flow()
        assert await waiting == b"during"
        peer.writer.close()


async def test_a_cut_resets_what_is_connected_and_lets_others_connect(echo: str) -> None:
    async with Proxy(echo) as proxy:
        peer = await Peer.connect(proxy.address)
        await peer.ask(b"before")
        await proxy.cut()
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await peer.ask(b"after")
        peer.writer.close()
        again = await Peer.connect(proxy.address)
        assert await again.ask(b"again") == b"again"
        assert proxy.connections == 2
        again.writer.close()


async def test_a_refusing_proxy_resets_new_connections(echo: str) -> None:
    async with Proxy(echo) as proxy:
        proxy.refuse(True)
        peer = await Peer.connect(proxy.address)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await peer.ask(b"?")
        peer.writer.close()


async def test_a_target_that_is_not_there_is_a_reset(unused_tcp_port: int) -> None:
    async with Proxy(f"127.0.0.1:{unused_tcp_port}") as proxy:
        peer = await Peer.connect(proxy.address)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await peer.ask(b"?")
        peer.writer.close()
