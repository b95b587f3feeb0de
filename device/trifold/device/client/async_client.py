"""The SDK's client: one bundle's device part, and a channel to the edge."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakSet

import grpc.aio
from tokenizers import Tokenizer

from trifold.device.client.call import explained
from trifold.device.client.chat import ChatTemplate, Message
from trifold.device.client.generation import Generation
from trifold.device.client.journal import Journal, Request
from trifold.device.client.link import Link
from trifold.device.client.tail import Tail
from trifold.device.client.text import Transcript
from trifold.device.client.timing import Timing
from trifold.proto.v1 import session_pb2 as pb
from trifold.proto.v1.session_pb2_grpc import EdgeServiceStub
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.errors import DamagedFile, DigestMismatch, InvalidRequest, NotExact, PromptTooLong
from trifold.shared.identity.keeper import Keeper
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.runtime.sampling import Sampling
from trifold.shared.runtime.shard import Shard
from trifold.shared.runtime.versions import ShardVersions
from trifold.shared.session.channel import Connection, way
from trifold.shared.session.service import info_of
from trifold.shared.session.status import from_rpc_error
from trifold.shared.telemetry import traces

if TYPE_CHECKING:
    from trifold.proto.v1.session_pb2_grpc import EdgeServiceAsyncStub


class AsyncClient:
    """Generates text with the device shard of a bundle here and the rest behind an edge.

    Any number of generations may run at once. Make it where an event loop runs, and use it as an
    asynchronous context manager. `timeout` is for how many seconds an edge may be silent, or away once lost.
    """

    def __init__(
        self,
        edge: str = "127.0.0.1:50061",
        *,
        bundle: Path | str,
        timeout: float = 30.0,
        threads: int = 0,
        inexact: bool = False,
        chunk: int = 512,
        tls: Path | str | None = None,
        insecure: bool = False,
    ) -> None:
        """Loads the device part of the bundle in the folder `bundle`, or in its subfolder `device`.

        Prompts are sent in steps of `chunk` tokens, or of fewer where a tier allows only those.
        New generations use the adapter version that is promoted in that folder, also while the client runs.
        With TLS as the node of the folder `tls`; without, on loopback only, unless that is `insecure`.

        Raises ConfigError for an edge that needs TLS, DamagedFile naming the file that is not
        what the manifest says, NotExact when the self-test fails here and `inexact` is not given.
        """
        node = way(edge, tls, insecure=insecure)
        self._folder = TierFolder.open(Path(bundle), "device")
        self._serving = self._folder.manifest.serving
        self._codec = RowCodec(self._serving.codec, self._serving.spec.hidden)
        shard = Shard.load(self._folder, threads=threads)
        if not (shard.exact or inexact):
            raise NotExact("this processor does not give the bits of the monolith; allow that with --inexact")
        self._versions = ShardVersions(shard, self._folder, threads=threads, inexact=inexact)
        self._versions.refresh()
        self._tokenizer = _tokenizer(self._folder)
        self._edge = edge
        self._timeout = timeout
        self._chunk = chunk
        self._engine = ThreadPoolExecutor(1, thread_name_prefix="trifold-device")
        self._connection = Connection(edge, node)
        self._closed = False
        self._running: WeakSet[Generation] = WeakSet()
        self._following = [asyncio.create_task(self._versions.follow())]
        if node:
            self._following.append(asyncio.create_task(Keeper(node).run()))

    @property
    def digest(self) -> str:
        """The serving digest of the bundle."""
        return self._folder.manifest.serving_digest

    @property
    def max_positions(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self._serving.spec.max_positions

    @property
    def adapter(self) -> str:
        """The digest of the adapter version that new generations use; empty for the bundle's own weights."""
        return self._versions.current.digest

    @property
    def info(self) -> pb.TierInfo:
        """The device itself, as it runs for new generations."""
        return info_of(self._versions.current.shard)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        eos: Sequence[int] | None = None,
        logprobs: int | None = None,
        journal: Path | str | None = None,
    ) -> Generation:
        """Continues a text, or token ids, by at most `max_tokens` tokens.

        It ends at a token of `eos` (the model's own unless given) or where a string of `stop` begins.
        `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are no limit. The same arguments, `seed` among
        them, give the same tokens. With `logprobs` each chunk tells the probability of its token and of that
        many of the likeliest. What is committed goes to the new file `journal`, for resume().

        Returns an asynchronous iterator of Chunk, which may raise any of the errors of the tiers, such as
        Unavailable when the edge is not there or was lost for longer than `timeout`.

        Raises PromptTooLong when the model has not that many positions, InvalidRequest for a parameter out of
        range or a journal that exists.
        """
        self._check_open()
        ids = self._encode(prompt)
        spec, version = self._serving.spec, self._versions.current
        _check_number("max_tokens", max_tokens, whole=True)
        if max_tokens < 1:
            raise InvalidRequest(f"max_tokens is {max_tokens}: it must be 1 or above")
        if len(ids) + max_tokens > spec.max_positions:
            asked = f"a prompt of {len(ids)} tokens and max_tokens {max_tokens}"
            raise PromptTooLong(f"{asked} do not fit the {spec.max_positions} positions of the model")
        if logprobs is not None:
            _check_number("logprobs", logprobs, whole=True)
            if logprobs < 0:
                raise InvalidRequest(f"logprobs is {logprobs}: it must be 0 or above")
        request = Request(
            serving_digest=self._folder.manifest.serving_digest,
            adapter_digest=version.digest,
            prompt=ids,
            sampling=_sampling(temperature, top_k, top_p, seed),
            max_tokens=max_tokens,
            stop=_stop_strings(stop),
            eos=tuple(spec.eos_ids if eos is None else eos),
            logprobs=logprobs,
        )
        return self._generation(Journal(request, None if journal is None else Path(journal)), version.shard)

    def resume(self, journal: Path | str) -> Generation:
        """Goes on with a generation of an earlier process; its first chunk holds what was committed before.

        It stays on the adapter version that it began with, which is loaded here if it is not in use.
        Raises DamagedFile naming the line, DigestMismatch when the journal belongs to another bundle or to an
        adapter version that is not here, InvalidRequest when another process uses it.
        """
        self._check_open()
        opened = Journal.open(Path(journal))
        try:
            theirs, ours = opened.request.serving_digest, self._folder.manifest.serving_digest
            if theirs != ours:
                what = f"{journal} was written with bundle {theirs[:12]}"
                raise DigestMismatch(f"{what}, this one is {ours[:12]}")
            return self._generation(opened, self._versions.load(opened.request.adapter_digest))
        except BaseException:
            opened.close()
            raise

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a chat that the assistant is to go on with.

        Raises UnsupportedModel when the model has no chat template.
        """
        return self._tokenizer.encode(self._template.render(messages), add_special_tokens=False).ids

    def tokenize(self, text: str) -> list[int]:
        """The token ids that generate() takes a text for."""
        return self._tokenizer.encode(text).ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, with those that have a meaning of their own; U+FFFD for half a character."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    async def describe(self) -> pb.DescribeResponse:
        """What the edge serves, its limits and load, and the tiers behind it. Raises Unavailable."""
        self._check_open()
        try:
            return await self._stub().Describe(pb.DescribeRequest(), timeout=self._timeout)
        except grpc.aio.AioRpcError as error:
            peer = f"the edge at {self._edge}"
            raise explained(from_rpc_error(error, peer), peer) from None

    async def aclose(self) -> None:
        """Ends what still runs and lets the edge know; the client cannot be used again."""
        self._closed = True
        for task in self._following:
            task.cancel()
        await asyncio.gather(*(generation.aclose() for generation in self._running))
        await self._connection.close(grace=1.0)
        self._engine.shutdown()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(_tokenizer_config(self._folder))

    def _stub(self) -> EdgeServiceAsyncStub:
        return EdgeServiceStub(self._connection.channel)

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidRequest("the client is closed")

    def _encode(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        ids = self.tokenize(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise InvalidRequest("the prompt is empty")
        vocab = self._serving.spec.vocab
        if wrong := [token for token in ids if not 0 <= token < vocab]:
            raise InvalidRequest(f"token {wrong[0]} of the prompt is not one of the model's {vocab}")
        return tuple(ids)

    def _generation(self, journal: Journal, shard: Shard) -> Generation:
        span = traces.begin("generate")
        link = Link(
            lambda **options: self._stub().Session(**options),
            self._edge,
            journal,
            info_of(shard),
            every_row=shard.attends,
            chunk=self._chunk,
            timeout=self._timeout,
            span=span,
        )
        tail = Tail(shard, self._codec, journal, self._engine)
        transcript = Transcript(self._tokenizer, journal.request)
        timing = Timing(span, transcript, len(journal.request.prompt))
        generation = Generation(journal, tail, link, transcript, timing)
        self._running.add(generation)
        return generation


def _tokenizer(folder: TierFolder) -> Tokenizer:
    try:
        tokenizer: Tokenizer = Tokenizer.from_buffer(folder.read("tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise DamagedFile(f"tokenizer.json of the device is not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _tokenizer_config(folder: TierFolder) -> dict[str, Any]:
    """tokenizer_config.json, with the chat template that newer checkpoints keep in a file of its own."""
    config: dict[str, Any] = {}
    try:
        if "tokenizer_config.json" in folder:
            config |= json.loads(folder.read("tokenizer_config.json"))
        if "chat_template.jinja" in folder:
            config["chat_template"] = folder.read("chat_template.jinja").decode()
    except (ValueError, TypeError) as error:
        raise DamagedFile(f"the tokenizer's configuration is not what it should be: {error}") from None
    return config


def _sampling(temperature: float, top_k: int, top_p: float, seed: int) -> Sampling:
    _check_number("temperature", temperature)
    _check_number("top_k", top_k, whole=True)
    _check_number("top_p", top_p)
    _check_number("seed", seed, whole=True)
    return Sampling(temperature, top_k, top_p, seed)


def _check_number(name: str, value: object, *, whole: bool = False) -> None:
    if not isinstance(value, Integral if whole else Real):
        raise InvalidRequest(f"{name} is {value!r}: it must be a {'whole ' * whole}number")


def _stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stops:
        raise InvalidRequest("a stop string is empty: it would stop before the first token")
    return stops
