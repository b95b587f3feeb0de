"""The matrix of certificates: every RPC, as its service tells them, with every certificate that is wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import grpc.aio
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.cloud.cores import codec_of, settled, some_rows
from tests.cloud.trainings import running_training
from tests.identities import HOST, TENANT, Forger, Pair, answering, enrolled, pair, self_signed
from tests.shared.sites import train_bundle
from tests.tiers import running_core, running_edge
from tests.wire import Peer
from trifold.cloud.authority.authority import Authority
from trifold.cloud.authority.service import AuthorityServer
from trifold.device.client.async_client import AsyncClient
from trifold.device.gateway.app import gateway
from trifold.device.service.desk import Desk
from trifold.device.service.generate import GenerateService
from trifold.device.service.journals import Journals
from trifold.device.service.keys import ApiKeys
from trifold.device.service.server import SiteServer
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.errors import StaleEpoch
from trifold.shared.identity.access import ACCESS
from trifold.shared.identity.name import ROLES, Role
from trifold.shared.identity.node import Node
from trifold.shared.session.channel import connect
from trifold.shared.session.ending import Ending

REFUSALS = {
    grpc.StatusCode.UNAVAILABLE,  # TLS did not come about
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
}
CALLERS: frozenset[Role] = frozenset(ROLES) - {"authority"}
ALONE = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
"""Every call shakes hands anew."""


class Method(NamedTuple):
    path: str
    streams: bool


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bundle("deepseek_v3", tmp_path_factory.mktemp("train"))[1]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.init(tmp_path_factory.mktemp("authority") / "authority", [HOST])


@pytest.fixture(scope="module")
def nodes(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A node of every role by its role, and a second core for the training process."""
    folder = tmp_path_factory.mktemp("nodes")
    made: dict[str, Path] = {role: enrolled(authority, folder / role, role) for role in CALLERS}
    return {**made, "training": enrolled(authority, folder / "training", "core", "training")}


@asynccontextmanager
async def running_gateway(bundle: Path, edge: str, tls: Path) -> AsyncIterator[SiteServer]:
    async with AsyncClient(edge, bundle=bundle, threads=1, tls=tls) as client:
        desk = Desk(client, ApiKeys(None), None, streams=64, timeout=20.0, max_tokens=8)
        service = GenerateService(desk, Journals(tls / "journals"))
        address = f"{HOST}:0"
        server = SiteServer(service, gateway(desk, "test"), listen=address, http=address, tls=tls)
        await server.start()
        try:
            yield server
        finally:
            await server.stop(0)


@asynccontextmanager
async def running_services(
    bundle: Path, authority: Authority, nodes: Mapping[str, Path]
) -> AsyncIterator[dict[str, str]]:
    """All that Trifold serves to nodes, with TLS, when it has heard who was revoked: addresses by name."""
    async with AsyncExitStack() as stack:
        server = AuthorityServer(authority, "127.0.0.1:0", "127.0.0.1:0")
        await server.start()
        stack.push_async_callback(server.stop)
        for folder in nodes.values():
            (folder / "authority.json").write_text(json.dumps({"address": server.renewal}))
        core = await stack.enter_async_context(running_core(bundle, tls=nodes["core"]))
        edge = await stack.enter_async_context(running_edge(bundle, core.address, tls=nodes["edge"]))
        training = await stack.enter_async_context(running_training(bundle, tls=nodes["training"]))
        clients = await stack.enter_async_context(running_gateway(bundle, edge.address, nodes["gateway"]))
        for folder in (authority.node, *(nodes[name] for name in ("core", "edge", "training", "gateway"))):
            await settled((folder / "revoked.crl").exists)
        yield {
            "edge": edge.address,
            "core": core.address,
            "training": training.server.address,
            "gateway": clients.address,
            "authority": server.renewal,
        }


async def served(service: str, address: str, node: Path) -> list[Method]:
    """Every method of every service at an address, as reflection lists them; the authority has none."""
    if service == "authority":
        return methods(["trifold.proto.v1.AuthorityService"])
    async with connect(address, Node(node)) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        async for response in stub.ServerReflectionInfo(requests, timeout=20):
            return methods([found.name for found in response.list_services_response.service])
    raise AssertionError("reflection lists nothing")


def methods(services: list[str]) -> list[Method]:
    found = [descriptor_pool.Default().FindServiceByName(name) for name in services]
    return [
        Method(f"/{service.full_name}/{method.name}", method.client_streaming or method.server_streaming)
        for service in found
        for method in service.methods
    ]


def wrong_callers(authority: Authority, nodes: Mapping[str, Path], folder: Path) -> dict[str, Pair | None]:
    """What a caller may show that must not let it in, each wrong in one way; None shows nothing."""
    forger, good = Forger(authority), [f"trifold://{TENANT}/edge/edge"]
    other = Authority.init(folder / "other", [HOST])
    revoked = enrolled(authority, folder / "revoked", "device", "revoked")
    authority.register.revoke("revoked")
    return {
        "expired": forger.certificate(good, begins=-2, ends=-0.01),
        "not yet valid": forger.certificate(good, begins=0.5, ends=1),
        "wrong authority": pair(enrolled(other, folder / "elsewhere", "edge", "edge")),
        "signed by a node": forger.signed_by(pair(nodes["edge"]), good),
        "self-signed": self_signed(good),
        "wrong use": forger.certificate(good, usages=[ExtendedKeyUsageOID.SERVER_AUTH]),
        "wrong name: none": forger.certificate([]),
        "wrong name: another scheme": forger.certificate(["spiffe://site/edge/edge"]),
        "wrong name: no such role": forger.certificate(["trifold://site/root/edge"]),
        "wrong name: two tenants": forger.certificate([*good, "trifold://other/edge/edge"]),
        "wrong name: two nodes": forger.certificate([*good, f"trifold://{TENANT}/core/core"]),
        "revoked": pair(revoked),
        "no certificate": None,
        **{
            f"other tenant, {role}": pair(
                enrolled(authority, folder / f"other-{role}", role, f"other-{role}", tenants=["other"])
            )
            for role in CALLERS
        },
    }


async def ends_with(channel: grpc.aio.Channel, method: Method) -> grpc.StatusCode:
    """The status of a call that says nothing: OK where it was answered with a message."""
    if not method.streams:
        unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method.path)
        try:
            await unary(b"", timeout=20)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK
    stream: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(method.path)
    call = stream(timeout=20)
    ending = Ending(call, "the service")
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await call.write(b"")
        await call.done_writing()
    try:
        async for _ in call:
            return grpc.StatusCode.OK
        return await call.code()
    except grpc.aio.AioRpcError:
        # Not the error's own status: gRPC may have made that up.
        return (await ending.error()).grpc_status


async def called(address: str, method: Method, shown: Pair | None, root: bytes) -> grpc.StatusCode:
    credentials = grpc.ssl_channel_credentials(root, *(shown or (None, None)))
    async with grpc.aio.secure_channel(address, credentials, ALONE) as channel:
        return await ends_with(channel, method)


async def called_in_plain_text(address: str, method: Method) -> grpc.StatusCode:
    async with grpc.aio.insecure_channel(address, ALONE) as channel:
        return await ends_with(channel, method)


# uvicorn looks for WebSockets, of which there are none here.
@pytest.mark.filterwarnings("ignore:websockets:DeprecationWarning")
async def test_no_rpc_lets_anybody_in_with_a_certificate_that_is_wrong(
    bundle: Path,
    authority: Authority,
    nodes: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = wrong_callers(authority, nodes, tmp_path)
    root, attempts, let_in = authority.root_pem, 0, []
    async with running_services(bundle, authority, nodes) as services:
        for service, address in services.items():
            for method in await served(service, address, nodes["device"]):
                assert method.path in ACCESS, "an RPC that nobody may call"
                entitled = ACCESS[method.path].intersection(CALLERS)
                for role in entitled:
                    status = await called(address, method, pair(nodes[role]), root)
                    assert status not in REFUSALS, f"{role} cannot call {method.path}: {status}"
                attempted = {"plain text": await called_in_plain_text(address, method)}
                for role in CALLERS - entitled:
                    shown = pair(nodes[role])
                    attempted[f"wrong role: {role}"] = await called(address, method, shown, root)
                for name, given in wrong.items():
                    # To the authority there is no other tenant.
                    if not (service == "authority" and name.startswith("other tenant")):
                        attempted[name] = await called(address, method, given, root)
                attempts += len(attempted)
                let_in += [
                    f"{name} at {method.path}: {status}"
                    for name, status in attempted.items()
                    if status not in REFUSALS
                ]
    with capsys.disabled():
        print(f"\ncertificate matrix, callers: {attempts - len(let_in)} of {attempts} refused")
    assert not let_in


def wrong_services(authority: Authority, folder: Path) -> dict[str, Pair | None]:
    """What a service may show that no caller must talk to; None is plain text."""
    forger, good = Forger(authority), [f"trifold://{TENANT}/core/core"]
    other = Authority.init(folder / "other", [HOST])
    edge = pair(enrolled(authority, folder / "signer", "edge", "signer"))
    return {
        "expired": forger.certificate(good, begins=-2, ends=-0.01),
        "not yet valid": forger.certificate(good, begins=0.5, ends=1),
        "wrong authority": pair(enrolled(other, folder / "elsewhere", "core")),
        "signed by a node": forger.signed_by(edge, good),
        "self-signed": self_signed(good),
        "wrong use": forger.certificate(good, usages=[ExtendedKeyUsageOID.CLIENT_AUTH]),
        "wrong name: another host": forger.certificate(good, hosts=["127.0.0.2", "core.example"]),
        "wrong name: no host": forger.certificate(good, hosts=[]),
        "plain text": None,
    }


async def test_no_rpc_is_sent_to_a_service_with_a_certificate_that_is_wrong(
    authority: Authority, nodes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attempts, talked = 0, []
    every = [Method(path, True) for path in ACCESS]
    async with answering(pair(nodes["core"])) as address, connect(address, Node(nodes["edge"])) as channel:
        assert {await ends_with(channel, method) for method in every} == {grpc.StatusCode.OK}
    for name, shown in wrong_services(authority, tmp_path).items():
        async with answering(shown) as address:
            for method in every:
                async with connect(address, Node(nodes["edge"])) as channel:
                    status = await ends_with(channel, method)
                attempts += 1
                if status is not grpc.StatusCode.UNAVAILABLE:
                    talked.append(f"{name} at {method.path}: {status}")
    with capsys.disabled():
        print(f"\ncertificate matrix, services: {attempts - len(talked)} of {attempts} refused")
    assert not talked


async def test_a_session_is_that_of_its_tenant_alone(
    bundle: Path, authority: Authority, tmp_path: Path
) -> None:
    core = enrolled(authority, tmp_path / "core", "core", "shared-core", tenants=["one", "two"])
    edges = [enrolled(authority, tmp_path / name, "edge", name, tenants=[name]) for name in ("one", "two")]
    digest = TierFolder.open(bundle, "cloud").manifest.serving_digest
    async with (
        running_core(bundle, tls=core) as running,
        Peer.at(running.address, "CoreService", edges[0]) as one,
        Peer.at(running.address, "CoreService", edges[1]) as two,
    ):
        talk, thief = one.call(), two.call()
        await talk.open(digest)
        await talk.send_rows(codec_of(running), some_rows(running)[:4], 0)
        await talk.result()
        # A higher epoch takes a session over, and this is another one of the same id.
        assert (await thief.open(digest, session=talk.session, epoch=9)).have == 0
        await talk.send_rows(codec_of(running), some_rows(running)[4:5], 4)
        assert (await talk.result()).header.rows == 1
        again = one.call()
        assert (await again.open(digest, session=talk.session, epoch=2)).have == 5
        assert type(await talk.end()) is StaleEpoch
        for each in (thief, again):
            await each.close()
