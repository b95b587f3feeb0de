"""ShardVersions: the shards of one tier while it runs, by adapter version."""

from __future__ import annotations

import asyncio
import gc
import logging
from dataclasses import dataclass
from threading import Lock
from typing import Final, Never
from weakref import WeakValueDictionary

from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.store import BASE, AdapterStore
from trifold.shared.errors import DigestMismatch, NotExact, Overloaded, TrifoldError
from trifold.shared.runtime.shard import Shard

_POLL_SECONDS: Final = 1.0
"""How soon a promotion is noticed."""

MOST_VERSIONS: Final = 4
"""In memory at once before a session on yet another is put off; what is promoted is loaded all the same."""

_RETRY_SECONDS: Final = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Version:
    """A loaded shard and the digest of its adapter, BASE for the bundle's own weights."""

    digest: str
    shard: Shard


class ShardVersions:
    """Follows the promotions of a tier. `current` is the version that new sessions get.

    The bundle's own shard and the current one stay in memory; any other one stays as long as somebody holds
    it, which is how a session ends on the version it began with. All versions compute the same graph, so a
    cache that one of them made has the form that every other one needs.
    """

    def __init__(self, base: Shard, folder: TierFolder, *, threads: int = 0, inexact: bool = False) -> None:
        """`base` is the shard of `folder`; others are loaded with these `threads`, and proved likewise."""
        self.base = base
        self.folder = folder
        self.current = Version(BASE, base)
        self._store = AdapterStore(folder)
        self._threads = threads
        self._inexact = inexact
        self._loaded = WeakValueDictionary({BASE: base})
        self._loading = Lock()
        self._seen: tuple[int, int] | None = None

    async def get(self, digest: str) -> Shard:
        """The proved shard that a peer asks for, loaded off the event loop where it is not in memory.

        Raises DigestMismatch when it was never promoted here, Overloaded while sessions hold MOST_VERSIONS
        others, and what load() raises.
        """
        shard = self._loaded.get(digest)
        if shard is None:
            shard = await asyncio.to_thread(self._admit, digest)
        return shard

    def load(self, digest: str) -> Shard:
        """The proved shard of a version; any thread may ask.

        Raises DigestMismatch when it is not on this disk, DamagedFile naming a file, or NotExact.
        """
        with self._loading:
            return self._load(digest)

    def refresh(self) -> None:
        """Takes over what has been promoted since the last call. Raises what load() raises, once."""
        stamp = self._store.stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        digest = self._store.current()
        self.current = Version(digest, self.load(digest))
        log.info("new sessions get adapter version %s", digest[:12] or "base")

    async def follow(self) -> Never:
        """Notices promotions for ever. A version that cannot be loaded is logged, and changes nothing."""
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            try:
                await asyncio.to_thread(self.refresh)
            except Exception as error:
                kept = self.current.digest[:12] or "base"
                unknown = not isinstance(error, TrifoldError)
                log.error("new sessions keep adapter version %s: %s", kept, error, exc_info=unknown)

    def _admit(self, digest: str) -> Shard:
        if digest not in self._store.promoted():
            what = f"the {self.folder.tier} has no promoted adapter version {digest[:12]!r}"
            raise DigestMismatch(f"{what}: promote it there first, or go back to one that all tiers have")
        with self._loading:
            if digest != self._store.current() and digest not in self._loaded and self._full():
                what = f"no room for adapter version {digest[:12]}: sessions hold {len(self._loaded)} others"
                raise Overloaded(what, retry_after=_RETRY_SECONDS)
            return self._load(digest)

    def _full(self) -> bool:
        if len(self._loaded) >= MOST_VERSIONS:
            gc.collect()  # what sessions held that have ended may wait for it
        return len(self._loaded) >= MOST_VERSIONS

    def _load(self, digest: str) -> Shard:
        shard = self._loaded.get(digest)
        if shard is None:
            shard = Shard.load(self._store.open(digest), threads=self._threads)
            if not (shard.exact or self._inexact):
                what = f"adapter version {digest[:12]} of the {shard.tier}"
                raise NotExact(f"{what} does not give the bits of the monolith; allow that by --inexact")
            self._loaded[digest] = shard
        return shard
