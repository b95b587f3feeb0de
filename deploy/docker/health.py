"""Ends with 0 where the service at HOST:PORT serves.

    python health.py HOST:PORT [FOLDER]

It is asked by gRPC's health protocol, as the node of a folder; without one it is enough that it listens.
"""

from __future__ import annotations

import asyncio
import socket
import sys

from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from trifold.shared.identity.node import Node
from trifold.shared.session.channel import connect

TIMEOUT = 5.0


async def serves(address: str, folder: str) -> bool:
    async with connect(address, Node(folder)) as channel:
        answer = await HealthStub(channel).Check(HealthCheckRequest(), timeout=TIMEOUT)
        return bool(answer.status == HealthCheckResponse.SERVING)


def main(address: str, folder: str = "") -> int:
    if folder:
        return 0 if asyncio.run(serves(address, folder)) else 1
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), TIMEOUT).close()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
