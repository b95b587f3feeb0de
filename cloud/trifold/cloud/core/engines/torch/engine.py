"""The core on torch: the rows of a batch through each layer together, on a CPU or on a GPU with CUDA.

It has been run on CPUs, with torch 2.13; what is for CUDA is written against torch's API, and not yet run.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate, pairwise
from typing import Final

import numpy as np
import torch
from torch import Tensor

from trifold.cloud.core.batching import BUDGET
from trifold.cloud.core.engines.engine import Part, check
from trifold.cloud.core.engines.torch.attention import pages_of, values_of_position
from trifold.cloud.core.engines.torch.builder import compute_dtype
from trifold.cloud.core.engines.torch.graphs import Graphs
from trifold.cloud.core.engines.torch.places import Places, Span, places
from trifold.cloud.core.engines.torch.tiling import TILINGS, Tiling
from trifold.cloud.core.engines.torch.weights import load_core
from trifold.cloud.core.kv.blocks import BLOCK, BlockPool, blocks_of
from trifold.cloud.core.kv.table import BlockTable
from trifold.cloud.train.accelerator import describe, find
from trifold.shared.bundle.folder import Progress, TierFolder
from trifold.shared.bundle.manifest import Tier
from trifold.shared.errors import Cancelled, TrifoldError
from trifold.shared.model.heads import key_heads
from trifold.shared.runtime.fingerprint import fingerprint, instructions
from trifold.shared.runtime.selftest import CHUNKINGS, ROWS, SelfTest, prove, some_rows
from trifold.shared.runtime.shard import Rows
from trifold.shared.settings import WeightFormat

_PROVING: Final = (1 + len(CHUNKINGS)) * blocks_of(2 * ROWS) + BUDGET
"""Blocks that the self-test takes."""


class TorchEngine:
    """The core of a bundle, with all caches in one pool of blocks."""

    tier: Tier = "cloud"
    most_rows = 512

    def __init__(
        self,
        folder: TierFolder,
        *,
        device: torch.device,
        weights: WeightFormat,
        memory: int,
        progress: Progress,
    ) -> None:
        """Loads without proving; `load` does both."""
        serving = folder.manifest.serving
        span = serving.cuts.layers(self.tier, len(serving.spec.layers))
        attention = serving.spec.layers[span.start].attention
        self.hidden = serving.spec.hidden
        self.provider = f"torch-{device.type}"
        self.fingerprint = ""
        self.exact = False
        self.tiling = TILINGS[device.type][0]
        self._device = device
        self._heads = attention.heads
        self._groups = attention.heads // key_heads(attention)
        self._core = load_core(folder, weights, device, progress)
        dtype = compute_dtype(weights, device)
        self._block_bytes = len(span) * values_of_position(attention) * BLOCK * dtype.itemsize
        self.pool = BlockPool(max(memory // self._block_bytes, _PROVING))
        self._pages = [pages_of(attention, self.pool.count + 1, dtype, device) for _ in span]
        self._captures = device.type == "cuda" and weights == "bf16"
        self._graphs: Graphs | None = None

    @classmethod
    def load(
        cls,
        folder: TierFolder,
        *,
        device: str = "cpu",
        weights: WeightFormat = "bf16",
        memory: int = 0,
        threads: int = 0,
        progress: Progress = lambda done, total: None,
    ) -> TorchEngine:
        """The engine of a folder on `device` ("cpu", "cuda", "cuda:N"), proved.

        `memory` bytes are for caches, or what the self-test takes if that is more. On a CPU `threads` threads
        work, or as many as torch thinks fit (0). `progress` hears of the weights checked, and loaded.
        Raises ConfigError for a device that is not here or a bundle without float weights, DamagedFile.
        """
        if threads:
            torch.set_num_threads(threads)
        place = find(device)
        if place.type == "cuda":
            # Neither sums in bf16 nor products split over what they add up.
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)
        engine = cls(folder, device=place, weights=weights, memory=memory, progress=progress)
        positions = folder.manifest.serving.spec.max_positions
        for tiling in TILINGS[place.type]:
            result = engine._prove(tiling, positions)
            if result.exact:
                break
        engine.exact = result.exact
        engine.fingerprint = fingerprint(
            f"{place.type}-{weights}",
            result.digest,
            engine=f"torch-{torch.__version__}",
            processor=instructions() if place.type == "cpu" else describe(place).replace(" ", "-"),
        )
        return engine

    def cache_bytes(self, capacity: int) -> int:
        """Memory of a cache for so many positions."""
        return blocks_of(capacity) * self._block_bytes

    def cache(self, capacity: int) -> BlockTable:
        """An empty cache for the positions [0, capacity). Raises Overloaded when there are too few blocks."""
        return self.pool.reserve(capacity)

    def release(self, cache: BlockTable) -> None:
        """Takes the blocks of a cache back; no later part may have it."""
        cache.release()

    @torch.inference_mode()
    def run(self, batch: Sequence[Part[BlockTable]]) -> list[Rows]:
        """As Engine.run(). Raises Cancelled for a cache that was released."""
        for part in batch:
            check(part, self.hidden)
            _check_held(part.cache)
        for part in batch:
            part.cache.truncate(part.base_pos)
        rows = torch.from_numpy(np.concatenate([part.rows for part in batch]))
        spans = [Span(part.cache.blocks, part.base_pos, len(part.rows)) for part in batch]
        try:
            out: Rows = self._compute(rows, spans).cpu().numpy()
        except Exception as error:
            raise TrifoldError(f"the core failed at a batch of {len(rows)} rows: {error}") from error
        for part in batch:
            part.cache.have = part.base_pos + len(part.rows)
        starts = accumulate((len(part.rows) for part in batch), initial=0)
        return [out[start:stop].copy() for start, stop in pairwise(starts)]

    @torch.inference_mode()
    def copy_block(self, cache: BlockTable, number: int) -> list[tuple[Tensor, ...]]:
        """As Copying.copy_block()."""
        _check_held(cache)
        return [pages.copy(cache.blocks[number]) for pages in self._pages]

    @torch.inference_mode()
    def paste_block(self, cache: BlockTable, number: int, block: list[tuple[Tensor, ...]]) -> None:
        """As Copying.paste_block()."""
        _check_held(cache)
        for pages, copied in zip(self._pages, block, strict=True):
            pages.paste(cache.blocks[number], copied)
        cache.have = (number + 1) * BLOCK

    def _compute(self, rows: Tensor, spans: Sequence[Span]) -> Tensor:
        # Each thread begins with the first GPU, and graphs are captured on whichever is the current one.
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            if self._graphs and self._graphs.fit(spans):
                return self._graphs.run(rows, spans)
            return self._forward(rows.to(self._device), self._places(spans).to(self._device))

    def _forward(self, rows: Tensor, at: Places) -> Tensor:
        return self._core(rows, self._pages, at, self.tiling)

    def _places(self, spans: Sequence[Span], least_blocks: int = 1) -> Places:
        return places(
            spans,
            multiple=self.tiling.multiple,
            heads=self._heads,
            groups=self._groups,
            apart=not self.tiling.fixed,
            least_blocks=least_blocks,
        )

    def _prove(self, tiling: Tiling, positions: int) -> SelfTest:
        """The self-test of this tiling, which is the engine's from now on."""
        self.tiling = tiling
        if self._captures:
            self._graphs = Graphs(self._forward, self._places, self.hidden, self._device)
        caches: list[BlockTable] = []

        def cache(capacity: int) -> BlockTable:
            caches.append(self.cache(capacity))
            return caches[-1]

        try:
            return prove(
                some_rows(self.hidden, positions),
                cache,
                lambda parts: self.run([Part(*part) for part in parts]),
                together=BUDGET,
            )
        finally:
            for made in caches:
                self.release(made)


def _check_held(cache: BlockTable) -> None:
    if cache.released:
        raise Cancelled("the session was given up")
