"""Latent attention of a single row, with its heads as the rows of one product.

They share their keys, which are their values, too. GroupQueryAttention takes a product for each head and
packs the keys again every time. Here they are packed once for each group of heads: twice as fast for 4 heads,
4 to 10 times for 16 and 128, with sums in the same order. Where it is another one, the self-test says so.
"""

from __future__ import annotations

import os
from typing import Final, NamedTuple

import trifold.shared.runtime.untold  # noqa: F401  # isort: skip - before onnxruntime

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from trifold.cloud.core.engines.onnxruntime.cut import Attention
from trifold.cloud.core.kv.blocks import BLOCK, blocks_of
from trifold.shared.runtime.engine import load
from trifold.shared.runtime.shard import WIDE_POSITIONS, Rows, value_of

_FEWEST_HEADS: Final = 8
"""Of a group: fewer are not worth a thread."""

_FEWEST_BLOCKS: Final = 2
"""With fewer positions a wide head would be summed in other parts (trifold.cloud.split.graph.attention)."""


class Single(NamedTuple):
    """One layer of one session, bound: the first `span` positions of its cache, of which `have` count."""

    span: int
    have: NDArray[np.int64]
    binding: ort.IOBinding


class Folded:
    """What layers of equal attention share; for one thread."""

    def __init__(self, attention: Attention, session: ort.InferenceSession, threads: int) -> None:
        heads, self._size = attention.query_heads, attention.size
        groups = (count for count in range(1, threads + 1) if heads % count == 0)
        self.groups = max((count for count in groups if heads // count >= _FEWEST_HEADS), default=1)
        self.step = BLOCK
        """Positions from one span to the next. With 1 the sums of softmax have no zeros behind them, which
        arm64 would add up in another order; but each row has to be bound again. With 0 nothing is folded."""
        self._session = session
        self._query = np.zeros((1, self.groups, heads // self.groups, self._size), np.float32)
        self._out = np.zeros_like(self._query)
        self._bound = value_of(self._query), value_of(self._out)

    @staticmethod
    def slots(positions: int) -> int:
        """For which a cache needs memory, to hold so many."""
        return BLOCK * max(blocks_of(positions), _FEWEST_BLOCKS)

    def takes(self, position: int) -> bool:
        """Whether the row there. Few keys are multiplied in ways of their own, and spans by position have no
        others behind them."""
        return self.step == BLOCK or (self.step == 1 and position >= WIDE_POSITIONS - 1)

    def run(self, single: Single | None, latents: Rows, position: int, qkv: Rows, out: Rows) -> Single:
        """From qkv (width) to out (heads · size), for the row at `position`; what to bring for the next one.

        `latents` (slots, size) are the layer's, of all positions before.
        """
        latents[position] = qkv[-self._size :]
        span = self.slots(position + 1) if self.step == BLOCK else position + 1
        if single is None or single.span != span:
            single = self._bind(latents[None, None, :span])
        self._query.reshape(-1)[:] = qkv[: self._query.size]
        single.have[0] = position + 1
        self._session.run_with_iobinding(single.binding)
        out[:] = self._out.reshape(-1)
        return single

    def _bind(self, latents: Rows) -> Single:
        have = np.zeros(1, np.int64)
        query, out = self._bound
        binding = self._session.io_binding()
        for name, value in (("query", query), ("latents", value_of(latents)), ("have", value_of(have))):
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output("out", out)
        return Single(latents.shape[2], have, binding)


def folded(attention: Attention, threads: int) -> Folded | None:
    """For layers like this one; None where keys are not values, or only one head has them."""
    if attention.caches > 1 or attention.query_heads == 1:
        return None
    session = load(_model(attention), b"", threads=threads)
    return Folded(attention, session, threads or len(os.sched_getaffinity(0)))


def _model(attention: Attention) -> bytes:
    """query (1, groups, heads, size) over the first `have` of latents (1, 1, span, size): out, as query."""
    node = helper.make_node(
        "Attention", ["query", "latents", "latents", "", "", "", "have"], ["out"], scale=attention.scale
    )
    inputs = {"query": TensorProto.FLOAT, "latents": TensorProto.FLOAT, "have": TensorProto.INT64}
    graph = helper.make_graph(
        [node],
        "folded",
        [helper.make_tensor_value_info(name, dtype, None) for name, dtype in inputs.items()],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    data: bytes = made.SerializeToString(deterministic=True)
    return data
