"""The desk of a site: where gRPC and HTTP hand in what their callers ask for, and get the answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client.core import Metric

from trifold.device.client.async_client import AsyncClient
from trifold.device.client.generation import Generation
from trifold.device.service.content import ContentFilter
from trifold.device.service.keys import ApiKeys, Caller
from trifold.device.service.places import Places
from trifold.device.service.rates import Rates
from trifold.proto.v1 import session_pb2 as pb
from trifold.shared.errors import DeadlineExceeded, Forbidden, InvalidRequest, Unauthenticated, Unavailable
from trifold.shared.runtime.sampling import Logprobs
from trifold.shared.telemetry import metrics

MOST_LOGPROBS: Final = 20

log = logging.getLogger(__name__)

_WAITING: Final = 1 / 10
"""Of the time for an answer, that it may wait for its place."""

Ending = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True)
class Piece:
    """A Chunk of the SDK after the content filter; the last one of an answer says why it ends."""

    text: str
    token_ids: tuple[int, ...]
    ending: Ending | None
    logprobs: Logprobs | None
    replayed: bool


class Desk:
    """Admits, filters and answers. `timeout` is for how many seconds an answer may take."""

    def __init__(
        self,
        client: AsyncClient,
        keys: ApiKeys,
        content_filter: ContentFilter | None,
        *,
        streams: int,
        timeout: float,
        max_tokens: int,
    ) -> None:
        """`streams` answers are given at a time, and some wait; `places` says how many.

        `max_tokens` is for answers whose length is left open, as far as the model's positions go.
        """
        self.client = client
        self.keys = keys
        self._filter = content_filter
        self._rates = Rates()
        self.places = Places(streams, timeout * _WAITING)
        self._timeout = timeout
        self._max_tokens = max_tokens

    def room(self, prompt: Sequence[int]) -> int:
        """The max_tokens of a request that does not say."""
        return max(1, min(self._max_tokens, self.client.max_positions - len(prompt)))

    def readings(self) -> Iterator[Metric]:
        """What the metrics of the site are now, besides those that are counted; any thread may ask."""
        yield metrics.RUNNING.of(self.places.running)
        yield metrics.WAITING.of(self.places.waiting)
        yield metrics.LIMIT.of(self.places.count)
        yield from metrics.build(self.client.info, self.client.digest, self.client.adapter)

    def deadline(self) -> float:
        """When what is asked now must be answered, on the clock of the event loop."""
        return asyncio.get_running_loop().time() + self._timeout

    @asynccontextmanager
    async def within(self, deadline: float) -> AsyncIterator[None]:
        """Raises DeadlineExceeded when the deadline passes meanwhile."""
        try:
            async with asyncio.timeout_at(deadline):
                yield
        except TimeoutError:
            raise DeadlineExceeded(f"the answer was not complete after {self._timeout:g} s") from None

    @contextmanager
    def _asking_tiers(self) -> Iterator[None]:
        """Callers have no part in it when the tiers do not accept this node, or it does not accept them."""
        try:
            yield
        except (Unauthenticated, Forbidden) as error:
            log.error("the tiers do not serve this node: %s", error.message)
            what = "the site cannot reach its model: its operator finds out why with `trifold doctor`"
            raise Unavailable(what) from None

    async def describe(self) -> pb.DescribeResponse:
        """The edge and the tiers behind it. Raises Unavailable."""
        with self._asking_tiers():
            return await self.client.describe()

    async def answers(
        self, caller: Caller, generations: Sequence[Generation]
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of all generations as they come, each with the number of its own, for one request.

        Whatever way it ends, the generations are closed. A prompt that several have counts once.
        Raises Overloaded above a rate limit and when there is no place, Filtered, and what a generation does.
        """
        requests = [generation.request for generation in generations]
        prompts = {request.prompt for request in requests}
        most = sum(request.max_tokens for request in requests)
        async with AsyncExitStack() as running:
            for generation in generations:
                await running.enter_async_context(generation)
            bill = running.enter_context(
                self._rates.admitted(caller, prompt=sum(map(len, prompts)), answer=most)
            )
            told = [request.logprobs for request in requests if request.logprobs is not None]
            if any(top > MOST_LOGPROBS for top in told):
                raise InvalidRequest(f"logprobs are told of at most {MOST_LOGPROBS} tokens")
            if self._filter:
                if told:
                    raise InvalidRequest("logprobs are not given where there is a content filter")
                for prompt in prompts:
                    self._filter.check(self.client.detokenize(prompt))
            await running.enter_async_context(self.places.taken(len(generations)))
            running.enter_context(self._asking_tiers())
            merged = _merged([self._screened(generation) for generation in generations])
            async for index, piece in await running.enter_async_context(aclosing(merged)):
                bill.tokens += len(piece.token_ids)
                yield index, piece

    async def _screened(self, generation: Generation) -> AsyncGenerator[Piece, None]:
        screen = self._filter.screen() if self._filter else None
        async for chunk in generation:
            if chunk.finish_reason == "cancelled":
                raise Unavailable("the service is shutting down")
            text: str = chunk.text
            ending: Ending | None = chunk.finish_reason
            if screen:
                text = screen.push(text)
                if ending and not screen.found:
                    text += screen.rest()
                if screen.found:
                    ending = "content_filter"
            yield Piece(text, chunk.token_ids, ending, chunk.logprobs, chunk.replayed)
            if ending:
                return


async def _merged(streams: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[tuple[int, Piece], None]:
    """What the streams give, as it comes: each is at most two pieces ahead of who reads this."""
    queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue(maxsize=1)

    async def pump(index: int, stream: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(stream):
                async for piece in stream:
                    await queue.put((index, piece))
        except Exception as error:
            await queue.put((index, error))

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(pumps)
        while left:
            index, piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            left -= piece.ending is not None
            yield index, piece
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
