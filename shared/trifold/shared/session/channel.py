"""What both ends of a hop agree on before the first message: sizes, windows, keepalive, reconnecting."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Final

import grpc.aio

from trifold.shared.errors import ConfigError
from trifold.shared.identity.node import Node

MESSAGE_BYTES: Final = 4 * 1024 * 1024
"""The largest message of the wire, in either direction."""

_KEEPALIVE_MS: Final = 10_000
"""A connection is probed this often where nothing arrives, …"""

_PING_MS: Final = 20_000
"""… and given up after this long without an answer, which on a slow link waits behind whole messages."""

_COMMON: Final[list[tuple[str, int]]] = [
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", _PING_MS),
    # gRPC 1.81 never starts the timer of the line above (chttp2's writing.cc) and gives every ping a minute.
    ("grpc.http2.ping_timeout_ms", _PING_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A reader that stalls makes its peer buffer one window: a fixed one, where probing would let it grow to
    # many times that. 1 MiB fills a link of 20 MB/s at 50 ms.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1024 * 1024),
]

SERVER_OPTIONS: Final[list[tuple[str, int]]] = [
    *_COMMON,
    # Half of what the other end keeps to, or its clock running a little fast would count as an attack.
    ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
]

CHANNEL_OPTIONS: Final[list[tuple[str, int]]] = [
    *_COMMON,
    # A service that was restarted is found within a moment: its sessions wait for it on a lease.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 250),
    ("grpc.enable_retries", 0),
]


class Connection:
    """The way to the service at HOST:PORT, which need not be there yet."""

    def __init__(self, address: str, node: Node | None = None) -> None:
        """With TLS as `node`, or without."""
        self._address = address
        self._node = node
        self._chain = b""
        self._channel: grpc.aio.Channel | None = None

    @property
    def channel(self) -> grpc.aio.Channel:
        """For a call that begins now: another one whenever the node's certificate was renewed.

        Calls that run on an older channel keep it, to their end.
        """
        chain = self._node.papers.chain if self._node else b""
        if self._channel is None or chain != self._chain:
            self._channel, self._chain = connect(self._address, self._node), chain
        return self._channel

    async def close(self, grace: float | None = None) -> None:
        if self._channel is not None:
            await self._channel.close(grace)


def connect(address: str, node: Node | None = None) -> grpc.aio.Channel:
    """A channel to the service at HOST:PORT, which need not be there yet; with TLS as `node`, or without."""
    if node is None:
        return grpc.aio.insecure_channel(address, CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(address, node.channel_credentials(), CHANNEL_OPTIONS)


def way(address: str, tls: Path | str | None, *, insecure: bool = False) -> Node | None:
    """As whom to call, or to listen at, HOST:PORT: the node of the folder `tls`, or nobody, without TLS.

    Raises ConfigError where that needs TLS, and for a folder that is not a node's.
    """
    if tls is not None:
        return Node(tls)
    if insecure or on_loopback(address):
        return None
    raise ConfigError(
        f"{address} is not on loopback: without TLS anyone on the way could read and write. Give the node's "
        "folder with --tls, or --insecure"
    )


def on_loopback(address: str) -> bool:
    """Whether HOST:PORT is of this machine and nobody outside can reach it."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
