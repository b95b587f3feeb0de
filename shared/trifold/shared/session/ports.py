"""Ports: taken before a service has loaded anything, so that it is told at once of another one there."""

from __future__ import annotations

import errno
import socket

from trifold.shared.errors import ConfigError


def listening(address: str) -> socket.socket:
    """A socket that listens at HOST:PORT; port 0 takes a free one. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), int(port)), family=family)
    except OSError as error:
        # Its own words repeat the address.
        why = "is another service there?" if error.errno == errno.EADDRINUSE else error.strerror
        raise ConfigError(f"cannot listen at {address}: {why}") from None


def check_free(*addresses: str | None) -> None:
    """Raises ConfigError where a service could not listen; None stands for an address that it has not."""
    for address in addresses:
        if address is not None:
            listening(address).close()
