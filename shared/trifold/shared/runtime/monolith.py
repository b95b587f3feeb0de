"""Monolith: the three shards of a bundle in one process, without a network: what a split must equal."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from trifold.shared.bundle.adapter import ADAPTED
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import TIERS, Manifest
from trifold.shared.bundle.store import BASE, AdapterStore
from trifold.shared.errors import DigestMismatch, InvalidRequest, PromptTooLong
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.runtime.sampling import Sampling, pick
from trifold.shared.runtime.shard import Rows, Shard

CHUNK: Final = 512
"""Prompt tokens fed at once."""


@dataclass(frozen=True)
class Token:
    """A generated token, the position it stands at, and the digest of the row that predicted it."""

    id: int
    position: int
    row_digest: str


def row_digest(row: Rows) -> str:
    """Eight bytes of BLAKE2b, in hex, of a decoded row (hidden,) as the device got it."""
    return hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest()


class Core(Protocol):
    """The shard of the cloud, or what else computes its layers."""

    def cache(self, capacity: int) -> Any: ...
    def run(self, cache: Any, inputs: Rows, base_pos: int) -> Rows: ...


class Monolith:
    """The shards of edge, cloud and device, and the codec between them."""

    def __init__(self, manifest: Manifest, edge: Shard, cloud: Core, device: Shard) -> None:
        self.manifest = manifest
        self.edge = edge
        self.cloud = cloud
        self.device = device
        self.codec = RowCodec(manifest.serving.codec, edge.hidden)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        adapter: str = BASE,
        threads: int = 0,
        core: Callable[[TierFolder], Core] | None = None,
    ) -> Monolith:
        """Load and prove all tiers of the bundle at `path`, in the version of digest `adapter`.

        `core` loads what is to compute the cloud's layers in place of its shard.
        Raises DamagedFile, DigestMismatch.
        """
        folders = {tier: TierFolder.open(path, tier) for tier in TIERS}
        if len({folder.manifest.serving_digest for folder in folders.values()}) > 1:
            raise DigestMismatch(f"{path}: the folders of the tiers are from different bundles")
        folders |= {tier: AdapterStore(folders[tier]).open(adapter) for tier in ADAPTED}
        edge, device = (Shard.load(folders[tier], threads=threads) for tier in ADAPTED)
        cloud = core(folders["cloud"]) if core else Shard.load(folders["cloud"], threads=threads)
        return cls(folders["edge"].manifest, edge, cloud, device)

    def session(self, capacity: int) -> MonolithSession:
        """A new session for the positions [0, capacity)."""
        return MonolithSession(self, capacity)

    def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        *,
        eos: Collection[int] | None = None,
        chunk: int = CHUNK,
    ) -> Iterator[Token]:
        """At most `max_tokens` tokens after the prompt, until one of `eos` (by default the model's).

        Raises PromptTooLong when prompt and tokens do not fit the model, InvalidRequest for an empty prompt.
        """
        if not prompt_ids:
            raise InvalidRequest("a prompt has at least one token")
        end = len(prompt_ids) + max_tokens
        if end > self.edge.spec.max_positions:
            room = self.edge.spec.max_positions
            raise PromptTooLong(f"{len(prompt_ids)} prompt and {max_tokens} new tokens in {room} positions")
        stop = set(self.edge.spec.eos_ids if eos is None else eos)
        session = self.session(end)
        tokens = np.asarray(prompt_ids, np.int64)
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            logits = session.feed(part, start, logits_from=min(len(tokens) - 1, start + len(part)))
        for position in range(len(tokens), end):
            token = pick(logits[-1], sampling, position)
            yield Token(token, position, row_digest(session.rows[-1]))
            if token in stop or position + 1 == end:
                return
            logits = session.feed(np.array([token]), position)


class MonolithSession:
    """One generation. `rows` are the decoded rows that the last `feed` computed logits from."""

    def __init__(self, monolith: Monolith, capacity: int) -> None:
        self._monolith = monolith
        self._caches = {
            "edge": monolith.edge.cache(capacity),
            "cloud": monolith.cloud.cache(capacity),
            "device": monolith.device.cache(capacity),
        }
        self.rows = np.empty((0, monolith.edge.hidden), np.float32)

    def feed(self, tokens: NDArray[np.int64], base_pos: int, logits_from: int | None = None) -> Rows:
        """The logits (m, vocab) of the positions from `logits_from` on, by default of all of `tokens` (n,).

        Whatever was fed at base_pos and behind it before is forgotten.
        """
        model = self._monolith
        first = base_pos if logits_from is None else logits_from
        rows = self._cut(model.edge.run(self._caches["edge"], tokens, base_pos), base_pos)
        rows = model.cloud.run(self._caches["cloud"], rows, base_pos)
        if model.device.attends:
            rows = self._cut(rows, base_pos)
            logits = model.device.run(self._caches["device"], rows, base_pos, first)
            self.rows = rows[first - base_pos :]
            return logits
        self.rows = self._cut(rows[first - base_pos :], first)
        if not len(self.rows):
            return np.empty((0, model.device.vocab), np.float32)
        return model.device.run(self._caches["device"], self.rows, first)

    def _cut(self, rows: Rows, base_pos: int) -> Rows:
        """Rows as they arrive behind a cut."""
        codec = self._monolith.codec
        return codec.decode(codec.encode(rows, base_pos), len(rows), base_pos)
