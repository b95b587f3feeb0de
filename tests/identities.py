"""An authority for tests, the nodes below it, and certificates that are wrong in one way each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ObjectIdentifier

from trifold.cloud.authority import certificates
from trifold.cloud.authority.authority import Authority
from trifold.shared import durable
from trifold.shared.identity.name import Identity, Role
from trifold.shared.identity.request import key_pem, new_key, signing_request, write_private

HOST = "127.0.0.1"
TENANT = "site"


class Pair(NamedTuple):
    """A private key and a certificate chain, in PEM."""

    key: bytes
    chain: bytes


def enrolled(
    authority: Authority,
    folder: Path,
    role: Role,
    node: str = "",
    *,
    tenants: Sequence[str] = (TENANT,),
    hosts: Sequence[str] = (HOST,),
    address: str = "",
) -> Path:
    """The folder of a node, enrolled without a network; it renews at the authority's `address`, if any."""
    key = new_key()
    invited = authority.invite(Identity(tuple(tenants), role, node or role), hosts, timedelta(hours=1))
    folder.mkdir(parents=True)
    write_private(folder / "key.pem", key_pem(key))
    durable.write(folder / "chain.pem", authority.enrol(invited, signing_request(key)))
    durable.write(folder / "authority.pem", authority.root_pem)
    if address:
        durable.write(folder / "authority.json", f'{{"address": "{address}"}}'.encode())
    return folder


def pair(folder: Path) -> Pair:
    return Pair((folder / "key.pem").read_bytes(), (folder / "chain.pem").read_bytes())


class Forger:
    """Certificates signed with an authority's own key, as it never would."""

    def __init__(self, authority: Authority) -> None:
        self.now = datetime.now(UTC)
        self._root = authority.root
        self._key = authority._key

    def certificate(
        self,
        uris: Sequence[str],
        *,
        hosts: Sequence[str] = (HOST,),
        usages: Sequence[ObjectIdentifier] = certificates.SERVES,
        begins: float = -1.0,
        ends: float = 1.0,
    ) -> Pair:
        """From so many hours from now to so many."""
        key = new_key()
        made = certificates.node(
            self._root,
            self._key,
            key.public_key(),
            uris=uris,
            hosts=hosts,
            usages=usages,
            begins=self.now + timedelta(hours=begins),
            ends=self.now + timedelta(hours=ends),
        )
        return Pair(key_pem(key), certificates.pem(made))

    def signed_by(self, signer: Pair, uris: Sequence[str], hosts: Sequence[str] = (HOST,)) -> Pair:
        """By a node, which is no authority, with its own certificate in the chain."""
        key, above = new_key(), x509.load_pem_x509_certificate(signer.chain)
        made = certificates.node(
            above,
            private(signer.key),
            key.public_key(),
            uris=uris,
            hosts=hosts,
            usages=certificates.SERVES,
            begins=self.now - timedelta(hours=1),
            ends=self.now + timedelta(hours=1),
        )
        return Pair(key_pem(key), certificates.pem(made) + signer.chain)


def private(pem: bytes) -> certificates.Key:
    key = serialization.load_pem_private_key(pem, None)
    assert isinstance(key, certificates.Key)
    return key


def self_signed(uris: Sequence[str], hosts: Sequence[str] = (HOST,)) -> Pair:
    """Signed with its own key, under the name of an authority."""
    now, key = datetime.now(UTC), new_key()
    itself = certificates.root(key, now - timedelta(hours=1), timedelta(hours=2))
    made = certificates.node(
        itself,
        key,
        key.public_key(),
        uris=uris,
        hosts=hosts,
        usages=certificates.SERVES,
        begins=now - timedelta(hours=1),
        ends=now + timedelta(hours=1),
    )
    return Pair(key_pem(key), certificates.pem(made))


@asynccontextmanager
async def answering(shown: Pair | None) -> AsyncIterator[str]:
    """A service that answers everything; with this certificate, or in plain text."""

    async def answer(_: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        await context.write(b"")

    class Everything(grpc.GenericRpcHandler):
        def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
            return grpc.stream_stream_rpc_method_handler(answer)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers([Everything()])
    if shown:
        port = server.add_secure_port(f"{HOST}:0", grpc.ssl_server_credentials([shown]))
    else:
        port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    try:
        yield f"{HOST}:{port}"
    finally:
        await server.stop(0)
