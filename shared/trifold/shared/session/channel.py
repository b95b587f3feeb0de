"""What both ends of a hop agree on before the first message: sizes, windows, keepalive, reconnecting."""

from __future__ import annotations

from typing import Final

import grpc.aio

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
    # A second service on the same port would take half of the first one's connections.
    ("grpc.so_reuseport", 0),
]

_CHANNEL_OPTIONS: Final[list[tuple[str, int]]] = [
    *_COMMON,
    # A service that was restarted is found within a moment: its sessions wait for it on a lease.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 250),
    ("grpc.enable_retries", 0),
]


def connect(address: str) -> grpc.aio.Channel:
    """A channel to the service at HOST:PORT, which need not be there yet."""
    return grpc.aio.insecure_channel(address, _CHANNEL_OPTIONS)
