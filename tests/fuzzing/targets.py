"""Every RPC of every service, as processes that tell what they reach, with what their callers say."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc.aio
import numpy as np
from cryptography import x509

from tests.fuzzing.fuzzer import SESSION, Target
from tests.fuzzing.mutation import Said
from tests.fuzzing.reach import Reach
from tests.neighbour import neighbour
from tests.processes import Processes, Service
from trifold.cloud.authority.authority import Authority
from trifold.proto.v1 import generate_pb2, identity_pb2, session_pb2, train_pb2
from trifold.shared.cli.service_process import ServiceProcess
from trifold.shared.identity import enrolment
from trifold.shared.identity.name import Identity
from trifold.shared.identity.node import Node
from trifold.shared.identity.request import new_key, signing_request
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.runtime.monolith import Monolith

_LOOPBACK: Final = "127.0.0.1"
_PACKAGE: Final = "/trifold.proto.v1."
_REQUEST: Final = b"<request's name>"
_TOKEN: Final = b"<token's name, which is 43 characters long>"
assert len(_TOKEN) == 43

_PARTS: Final = (
    "server",
    "service",
    "stream",
    "frames",
    "table",
    "scheduler",
    "conversation",
    "window",
    "status",
)
_SESSION_MODULES: Final = [f"trifold.shared.session.{part}" for part in _PARTS] + [
    "trifold.shared.runtime.codec"
]
MODULES: Final[Mapping[str, list[str]]] = {
    "edge": [*_SESSION_MODULES, "trifold.edge.service.service", "trifold.edge.service.upstream"],
    "cloud": [*_SESSION_MODULES, "trifold.cloud.core.service", "trifold.shared.runtime.codec"],
    "train": [
        *(f"trifold.cloud.train.{name}" for name in ("service", "sites", "frames", "activations", "core")),
        *(f"trifold.shared.session.{name}" for name in ("server", "stream", "pieces", "scheduler")),
        "trifold.shared.training.wire",
        "trifold.shared.runtime.codec",
    ],
    "generate": [
        *(f"trifold.device.service.{name}" for name in ("generate", "desk", "journals", "rates")),
        *(
            f"trifold.device.client.{name}"
            for name in (
                "async_client",
                "call",
                "chat",
                "generation",
                "journal",
                "link",
                "stream",
                "tail",
                "text",
            )
        ),
        "trifold.shared.session.decoding",
    ],
    "authority": [
        *(f"trifold.cloud.authority.{name}" for name in ("service", "authority", "register", "certificates")),
        *(f"trifold.shared.identity.{name}" for name in ("request", "gate", "access", "name", "revocations")),
        "trifold.shared.session.decoding",
    ],
}
"""What the calls of each service go through: its handlers, and what they have their messages checked by."""


class Traced:
    """What the process of one service reaches, and the interpreter that tells of it."""

    def __init__(self, service: str, folder: Path) -> None:
        self.reach = Reach.make(folder / f"reach-{service}", MODULES[service])
        self.interpreter = [sys.executable, "-m", "tests.fuzzing.traced", str(folder / f"reach-{service}")]


@asynccontextmanager
async def process(traced: Traced, *arguments: str) -> AsyncIterator[ServiceProcess]:
    """A traced service."""
    running = await asyncio.to_thread(ServiceProcess, arguments, interpreter=traced.interpreter)
    traced.reach.begin()
    try:
        yield running
    finally:
        await asyncio.to_thread(running.__exit__, None, None, None)


@asynccontextmanager
async def tier(service: Service, bundle: Path, folder: Path) -> AsyncIterator[list[Target]]:
    """Session and Describe of an edge or a core, between which and the other one nothing is wrong."""
    traced, monolith = Traced(service, folder), Monolith.load(bundle, threads=1)
    options = "--threads", "1", "--lease", "1"
    with Processes(bundle, *options, interpreters={service: traced.interpreter}) as tiers:
        traced.reach.begin()
        async with (
            neighbour(tiers.edge, monolith) as honest,
            connected(tiers.address(service)) as channel,
        ):
            name = {"edge": "EdgeService", "cloud": "CoreService"}[service]
            make = partial(
                Target,
                channel=channel,
                neighbour=honest.step,
                reach=traced.reach,
                log=partial(tiers.log, service),
            )
            yield [
                make(f"{_PACKAGE}{name}/Session", seeds=_sessions(service, monolith)),
                make(f"{_PACKAGE}{name}/Describe", seeds=[(b"",)]),
            ]


@asynccontextmanager
async def training(bundle: Path, folder: Path) -> AsyncIterator[list[Target]]:
    """Train and Describe of a training process; `bundle` has float slices."""
    traced, monolith = Traced("train", folder), Monolith.load(bundle, threads=1)
    serve = ["cloud", "train", str(bundle), "--listen", f"{_LOOPBACK}:0", "--threads", "1", "--lease", "1"]
    async with process(traced, *serve) as running, connected(running.address) as channel:
        seeds = _trainings(monolith)
        honest = await _Site.met(channel, [message for message in seeds[0][:-1] if message])
        make = partial(Target, channel=channel, neighbour=honest.step, reach=traced.reach, log=running.log)
        yield [
            make(f"{_PACKAGE}TrainService/Train", seeds=seeds),
            make(f"{_PACKAGE}TrainService/Describe", seeds=[(b"",)]),
        ]


@asynccontextmanager
async def generation(bundle: Path, folder: Path) -> AsyncIterator[list[Target]]:
    """Generate of a site's service."""
    traced, monolith = Traced("generate", folder), Monolith.load(bundle, threads=1)
    with Processes(bundle, "--threads", "1", "--lease", "1") as tiers:
        serve = ["device", "serve", str(bundle), "--threads", "1", "--edge", tiers.edge]
        serve += [
            "--journals",
            str(folder / "journals"),
            "--listen",
            f"{_LOOPBACK}:0",
            "--http",
            f"{_LOOPBACK}:0",
        ]
        async with (
            neighbour(tiers.edge, monolith) as honest,
            process(traced, *serve) as running,
            connected(running.address) as channel,
        ):
            names = iter(range(10**12))
            fresh = {_REQUEST: lambda: f"request-{next(names):08}".encode()}
            path = f"{_PACKAGE}GenerateService/Generate"
            yield [Target(path, channel, _generations(), honest.step, traced.reach, running.log, fresh)]


@asynccontextmanager
async def authority(folder: Path) -> AsyncIterator[list[Target]]:
    """Enrol, Renew and Revoked of an authority, over TLS; the two latter as a node."""
    made = Authority.init(folder / "authority", [_LOOPBACK])
    traced = Traced("authority", folder)
    anywhere = ["--listen", f"{_LOOPBACK}:0", "--listen-nodes", f"{_LOOPBACK}:0"]
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(
            process(traced, "certs", "serve", str(made.folder), *anywhere)
        )
        address = running.address.rstrip(",")

        def token(name: str = "fuzzer") -> bytes:
            return made.invite(Identity(("site",), "device", name), (), timedelta(hours=1)).encode()

        node = await enrolment.enrol(address, token("honest").decode(), made.fingerprint, folder / "honest")
        credentials = grpc.ssl_channel_credentials(made.enrolment)
        options: Any = [("grpc.ssl_target_name_override", enrolment.HOST), *_UNLIMITED]
        enrolling = grpc.aio.secure_channel(address, credentials, options)
        enrolling = await stack.enter_async_context(enrolling)
        renewing = await stack.enter_async_context(connected(node.authority_address, node))
        honest = partial(_renew, renewing, node)
        enrol = identity_pb2.EnrolRequest(token=_TOKEN.decode(), signing_request=signing_request(new_key()))
        renew = identity_pb2.RenewRequest(signing_request=node.signing_request())
        other = identity_pb2.RenewRequest(signing_request=signing_request(new_key()))
        make = partial(Target, neighbour=honest, reach=traced.reach, log=running.log)
        yield [
            make(
                f"{_PACKAGE}EnrolService/Enrol",
                enrolling,
                [(enrol.SerializeToString(),)],
                fresh={_TOKEN: token},
            ),
            make(
                f"{_PACKAGE}AuthorityService/Renew",
                renewing,
                [(renew.SerializeToString(),), (other.SerializeToString(),)],
            ),
            make(f"{_PACKAGE}AuthorityService/Revoked", renewing, [(b"",)]),
        ]


_UNLIMITED: Final = [("grpc.max_send_message_length", -1)]
"""The limit of the wire is the service's to keep."""


@asynccontextmanager
async def connected(address: str, node: Node | None = None) -> AsyncIterator[grpc.aio.Channel]:
    credentials = node.channel_credentials() if node else None
    options: Any = _UNLIMITED
    if credentials:
        channel = grpc.aio.secure_channel(address, credentials, options)
    else:
        channel = grpc.aio.insecure_channel(address, options)
    async with channel:
        yield channel


def _sessions(service: Service, monolith: Monolith) -> list[Said]:
    """Prompts in chunks, tokens one by one, drafts that are rejected, and sessions gone on with."""
    codec, digest = monolith.codec, monolith.manifest.serving_digest

    def opening(epoch: int = 1, **fields: Any) -> bytes:
        honest = {"session": SESSION, "epoch": epoch, "serving_digest": digest, "capacity": 64}
        return session_pb2.SessionRequest(open=session_pb2.Open(**{**honest, **fields})).SerializeToString()

    def step(seq: int, base_pos: int, rows: int = 1, epoch: int = 1, branch: int = 0, **header: Any) -> bytes:
        header |= {"session": SESSION, "epoch": epoch, "seq": seq, "branch": branch}
        header |= {"base_pos": base_pos, "rows": rows, "logits_from": base_pos + rows - 1}
        if service == "edge":
            tokens = session_pb2.Tokens(ids=range(1, rows + 1))
            made = session_pb2.Step(header=session_pb2.Header(**header), tokens=tokens)
        else:
            ones = np.ones((rows, codec.hidden), np.float32)
            header["codec"] = codec.wire
            made = session_pb2.Step(header=session_pb2.Header(**header), rows=codec.encode(ones, base_pos))
        return session_pb2.SessionRequest(step=made).SerializeToString()

    close = session_pb2.SessionRequest(close=session_pb2.Close()).SerializeToString()
    wish: dict[str, Any] = {}
    if service == "edge":
        wish["sampling"] = session_pb2.Sampling(temperature=0.7, top_k=5, top_p=0.9, seed=3)
    return [
        (opening(steps_in_flight=4, **wish), step(0, 0, 4), step(1, 4), step(2, 5), close),
        (opening(), step(0, 0, 8), step(1, 8), step(2, 9), step(3, 8, branch=1), step(4, 9, branch=0), close),
        (opening(), step(0, 0, 4), None, opening(2), step(0, 2, 2, 2), step(1, 4, 1, 2), close),
        (opening(),),
    ]


def _trainings(monolith: Monolith) -> list[Said]:
    """Batches forward and back, one that is only evaluated, one in pieces, and a site that comes back."""
    codec, digest = monolith.codec, monolith.manifest.serving_digest
    rows = np.random.default_rng(3).standard_normal((2, 6, codec.hidden), np.float32)
    data = b"".join(codec.encode(each, 0) for each in rows)
    fp32 = b"".join(RowCodec("none", codec.hidden).encode(each, 0) for each in rows)

    def said(**kind: Any) -> bytes:
        return train_pb2.TrainRequest(**kind).SerializeToString()

    def opening(gradients: int = codec.wire) -> bytes:
        fields: Any = {"session": SESSION, "serving_digest": digest, "gradients": gradients}
        return said(open=train_pb2.TrainOpen(**fields))

    def batch(number: int, codec_number: int = codec.wire) -> Any:
        fields: Any = {"id": number, "sequences": 2, "length": 6, "codec": codec_number}
        return train_pb2.Batch(**fields)

    def forward(number: int, data: bytes = data, *, keep: bool = True) -> bytes:
        return said(forward=train_pb2.Forward(batch=batch(number), keep=keep, data=data))

    def backward(number: int, codec_number: int = codec.wire, data: bytes = data) -> bytes:
        return said(backward=train_pb2.Backward(batch=batch(number, codec_number), data=data))

    none = session_pb2.CODEC_NONE
    close = said(close=train_pb2.TrainClose())
    return [
        (opening(), forward(1), backward(1), close),
        (opening(), forward(1, keep=False), backward(1), close),
        (opening(none), forward(1), forward(2), backward(2, none, fp32), backward(1, none, fp32), close),
        (opening(), forward(1, data[:40]), said(piece=train_pb2.Piece(data=data[40:])), close),
        (opening(), forward(1), None, opening(), backward(1), close),
    ]


def _generations() -> list[Said]:
    """Text, tokens and chats, with everything that may be asked for, and a generation gone on with."""
    request, name = generate_pb2.GenerateRequest, _REQUEST.decode()
    sampling = session_pb2.Sampling(temperature=0.9, top_k=20, top_p=0.9, seed=7)
    turns = [
        generate_pb2.Turn(role=role, content="Read a file.")
        for role in ("developer", "user", "assistant", "user")
    ]
    requests = [
        request(text="import os\n", max_tokens=3, sampling=sampling, stop=["\n\n"]),
        request(tokens=session_pb2.Tokens(ids=[1, 2, 3]), max_tokens=2, logprobs=3),
        request(chat=generate_pb2.Chat(turns=turns), max_tokens=2),
        request(request_id=name, text="def", max_tokens=3),
    ]
    again = request(request_id=name).SerializeToString()
    said: list[Said] = [(each.SerializeToString(),) for each in requests]
    return [*said, (requests[-1].SerializeToString(), None, again), (again,)]


class _Site:
    """An honest site beside the fuzzer: the same batch again and again, and each time the same bits."""

    def __init__(self, call: Any, messages: list[bytes]) -> None:
        self._call = call
        self._responses = aiter(call)
        self._messages = messages
        self._expected: list[bytes] = []

    @classmethod
    async def met(cls, channel: grpc.aio.Channel, messages: list[bytes]) -> _Site:
        opening, *batches = messages
        site = cls(channel.stream_stream(f"{_PACKAGE}TrainService/Train")(wait_for_ready=True), batches)
        await site._call.write(opening.replace(SESSION, b"an honest site's"))
        assert await anext(site._responses)
        site._expected = await site._answers()
        return site

    async def step(self) -> None:
        assert await self._answers() == self._expected

    async def _answers(self) -> list[bytes]:
        answers = []
        for message in self._messages:
            await self._call.write(message)
            async with asyncio.timeout(30):
                answer = train_pb2.TrainResponse.FromString(await anext(self._responses))
            answers.append(answer.computed.data)
        return answers


async def _renew(channel: grpc.aio.Channel, node: Node) -> None:
    """An honest node gets the certificate that it is entitled to."""
    method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
    method = channel.unary_unary(f"{_PACKAGE}AuthorityService/Renew")
    request = identity_pb2.RenewRequest(signing_request=node.signing_request())
    answer = identity_pb2.RenewResponse.FromString(await method(request.SerializeToString()))
    certificate = x509.load_pem_x509_certificate(answer.chain)
    assert Identity.of(certificate) == node.identity
    assert certificate.public_key() == node.papers.certificate.public_key()
