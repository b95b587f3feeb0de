"""How a machine becomes a node: a key of its own, a token, and a certificate for both."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import socket
import ssl
from pathlib import Path
from typing import Final

import trifold.shared.grpc_engine  # noqa: F401  # isort: skip - before grpc

import grpc.aio
from cryptography import x509

from trifold.proto.v1 import identity_pb2 as pb
from trifold.proto.v1.identity_pb2_grpc import EnrolServiceStub
from trifold.shared import durable
from trifold.shared.errors import ConfigError, Unauthenticated, Unavailable
from trifold.shared.identity import node as folder_of
from trifold.shared.identity.name import Identity
from trifold.shared.identity.node import Node
from trifold.shared.identity.request import key_pem, new_key, signing_request, write_private
from trifold.shared.session.status import from_rpc_error

HOST: Final = "enrolment.trifold.invalid"
"""In the certificate of every enrolment service, which is known by its fingerprint and not by its host."""

_TIMEOUT: Final = 10.0


async def enrol(authority: str, token: str, pinned: str, folder: Path) -> Node:
    """Makes `folder` that of a node: its key is made here and stays here.

    `authority` is HOST:PORT of the enrolment service, `pinned` the SHA-256 of its certificate in hex.
    Raises ConfigError where there is a node already and for a `pinned` that is none, Unauthenticated for
    another fingerprint (the token is not sent then), Forbidden for a token that does not hold, Unavailable.
    """
    if (folder / folder_of.CHAIN).exists():
        raise ConfigError(f"{folder} holds a node already: give another folder, or remove that one")
    expected = pinned.replace(":", "").lower()
    if not re.fullmatch("[0-9a-f]{64}", expected):
        raise ConfigError(
            f"the fingerprint is {pinned!r}: it must be 64 hex digits, as `trifold certs init` told it"
        )
    certificate = await _shown(authority)
    if fingerprint(certificate) != expected:
        shown = f"{authority} shows a certificate with the fingerprint {fingerprint(certificate)}"
        raise Unauthenticated(f"{shown}, not the one that was given: {_answering(certificate)}")
    key = new_key()
    answer = await _ask(authority, certificate, token, signing_request(key))
    address = f"{authority.rpartition(':')[0]}:{answer.authority_port}"
    return _settled(folder, key_pem(key), answer, address)


def fingerprint(pem: bytes) -> str:
    """SHA-256 of a certificate, in hex, as `openssl x509 -fingerprint -sha256` has it between its colons."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.decode())).hexdigest()


def _answering(certificate: bytes) -> str:
    """Who may have shown it, which is not what was expected."""
    somebody = "somebody else may be answering there"
    try:
        Identity.of(x509.load_pem_x509_certificate(certificate))
    except (Unauthenticated, ValueError):
        return somebody
    return f"{somebody}, or it is the port for enrolled nodes: give that of `trifold certs serve --listen`"


def _settled(folder: Path, key: bytes, answer: pb.EnrolResponse, authority: str) -> Node:
    """The node in its new folder."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_private(folder / folder_of.KEY, key)
    durable.write(folder / folder_of.AUTHORITY, answer.authority)
    durable.write(folder / folder_of.ADDRESS, json.dumps({"address": authority}).encode())
    durable.write(folder / folder_of.CHAIN, answer.chain)
    return Node(folder)


async def _shown(address: str) -> bytes:
    """The certificate that a service shows, in PEM: nothing is sent to it yet, so nobody need be trusted."""
    host, _, port = address.rpartition(":")
    try:
        place = host.strip("[]"), int(port)
        return await asyncio.to_thread(_shown_at, place)
    except (OSError, ValueError) as error:
        hint = "is `trifold certs serve` running there?"
        raise Unavailable(f"no enrolment service answers at {address} ({error}): {hint}") from None


def _shown_at(place: tuple[str, int]) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    # By the name that is in it: gRPC complains on the authority's terminal of any other.
    with (
        socket.create_connection(place, timeout=_TIMEOUT) as connection,
        context.wrap_socket(connection, server_hostname=HOST) as shown,
    ):
        return ssl.DER_cert_to_PEM_cert(shown.getpeercert(binary_form=True) or b"").encode()


async def _ask(address: str, certificate: bytes, token: str, request: bytes) -> pb.EnrolResponse:
    """What the service with this certificate answers."""
    credentials = grpc.ssl_channel_credentials(certificate)
    options = [("grpc.ssl_target_name_override", HOST)]
    async with grpc.aio.secure_channel(address, credentials, options) as channel:
        message = pb.EnrolRequest(token=token, signing_request=request)
        try:
            return await EnrolServiceStub(channel).Enrol(message, timeout=_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, f"the authority at {address}") from None
