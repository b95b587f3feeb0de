"""Rate limits: token buckets of requests and of tokens, two for each caller."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from trifold.device.service.keys import Caller
from trifold.shared.errors import InvalidRequest, Overloaded


class Bucket:
    """Holds what may be used at once: a minute's worth, which comes back over a minute."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._used = 0.0
        self._at = clock()

    def missing(self, amount: int, per_minute: int) -> float:
        """Seconds until so much may be taken. Raises InvalidRequest when it never may."""
        if amount > per_minute:
            raise InvalidRequest(f"a request of {amount} tokens is above the limit of {per_minute} a minute")
        now = self._clock()
        self._used = max(0.0, self._used - (now - self._at) * per_minute / 60)
        self._at = now
        return max(0.0, (self._used + amount - per_minute) * 60 / per_minute)

    def take(self, amount: int) -> None:
        """Takes it out; less than nothing is put back."""
        self._used += amount


@dataclass
class Bill:
    """What a request has used so far."""

    tokens: int


class Rates:
    """The buckets of all callers."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests: dict[str, Bucket] = {}
        self._tokens: dict[str, Bucket] = {}

    @contextmanager
    def admitted(self, caller: Caller, *, prompt: int, answer: int) -> Iterator[Bill]:
        """A request of so many tokens at most, of which at its end those not on the bill are given back.

        Raises Overloaded saying when there is room for it, InvalidRequest when there never is.
        """
        most = prompt + answer
        wanted = [
            (self._requests, 1, caller.requests_per_minute),
            (self._tokens, most, caller.tokens_per_minute),
        ]
        limited = [
            (buckets.setdefault(caller.name, Bucket(self._clock)), amount, limit)
            for buckets, amount, limit in wanted
            if limit
        ]
        if wait := max((bucket.missing(amount, limit) for bucket, amount, limit in limited), default=0.0):
            raise Overloaded(f"the limit of this key is reached: ask again in {wait:.1f} s", retry_after=wait)
        for bucket, amount, _ in limited:
            bucket.take(amount)
        bill = Bill(prompt)
        try:
            yield bill
        finally:
            if caller.tokens_per_minute:
                self._tokens[caller.name].take(bill.tokens - most)
