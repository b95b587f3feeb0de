"""CUDA graphs: a batch of single rows as one launch, instead of thousands of them from Python.

Written against torch's API (torch.cuda.CUDAGraph); it has not been run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from trifold.cloud.core.engines.torch.places import Places, Span
from trifold.cloud.core.kv.blocks import NOBODYS, blocks_of

_MOST_ROWS: Final = 128

Compute = Callable[[Tensor, Places], Tensor]
Plan = Callable[[Sequence[Span], int], Places]
"""Places of some spans, with at least so many blocks each."""


@dataclass(frozen=True)
class Graph:
    """A captured batch: what it reads, what it writes."""

    graph: torch.cuda.CUDAGraph
    rows: Tensor
    places: Places
    out: Tensor


class Graphs:
    """Graphs by number of rows and of blocks that every session has, both rounded up to powers of two.

    Captured when a batch first needs them. Where there are fewer sessions or blocks, nobody's stand in.
    """

    def __init__(self, compute: Compute, plan: Plan, hidden: int, device: torch.device) -> None:
        self._compute = compute
        self._plan = plan
        self._hidden = hidden
        self._device = device
        self._graphs: dict[tuple[int, int], Graph] = {}
        self._memory = torch.cuda.graph_pool_handle()

    @staticmethod
    def fit(spans: Sequence[Span]) -> bool:
        """Whether these are single rows, and not too many."""
        return len(spans) <= _MOST_ROWS and all(span.rows == 1 for span in spans)

    def run(self, rows: Tensor, spans: Sequence[Span]) -> Tensor:
        """Behind the layers, good until the next call: rows of spans that fit."""
        size = _power(len(spans))
        blocks = _power(max(blocks_of(span.base_pos + 1) for span in spans))
        graph = self._graphs.get((size, blocks)) or self._capture(size, blocks)
        graph.rows[: len(rows)].copy_(rows)
        graph.places.copy_from(self._plan([*spans, *_nobody(size - len(spans))], blocks))
        graph.graph.replay()
        return graph.out[: len(rows)]

    def _capture(self, size: int, blocks: int) -> Graph:
        rows = torch.zeros(size, self._hidden, device=self._device)
        places = self._plan(_nobody(size), blocks).to(self._device)
        # Once before, on a stream of its own, so that libraries have chosen kernels and taken their memory.
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._compute(rows, places)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            out = self._compute(rows, places)
        return self._graphs.setdefault((size, blocks), Graph(graph, rows, places, out))


def _nobody(count: int) -> list[Span]:
    return [Span((NOBODYS,), 0, 1)] * count


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
