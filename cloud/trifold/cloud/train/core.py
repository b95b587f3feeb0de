"""FrozenCore: rows of a batch forward, gradients back, and as little kept in between as the budget says."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch

from trifold.cloud.train.activations import Activations, Graph, Held
from trifold.shared.errors import BadRows
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.training import wire
from trifold.shared.training.diverged import ADVICE
from trifold.shared.training.shard import TorchShard, batch_of
from trifold.shared.training.wire import Batch


@dataclass(frozen=True, slots=True)
class Product:
    """A batch of rows or gradients, encoded, and whether the batch had to go forward once more for it."""

    data: bytes
    recomputed: bool = False


class FrozenCore:
    """The layers of the cloud in torch; its weights do not change. All methods are for one thread.

    A graph is recorded while there is room for it in the budget, for which older ones are given up. A batch
    without one goes forward once more for its gradients: in the room that is free, since others would have to
    do the same if they gave way, or else layer by layer. That takes the inputs of the layers and what one of
    them keeps, which is the least that gradients can be had for, and all that is ever beyond the budget.
    """

    def __init__(self, shard: TorchShard, codec: RowCodec, memory: int) -> None:
        """Rows travel in `codec`; activations may take `memory` bytes where the shard is."""
        self.activations = Activations(memory)
        self.recomputed = 0
        self._shard = shard
        self._codec = codec
        # A graph grows with its rows: so many are known not to fit.
        self._too_many: float = inf

    def forward(self, held: Held, *, keep: bool) -> Product:
        """The rows behind the core. Raises BadRows for values that are not finite."""
        rows = self._rows(held)
        if keep and held.rows < self._too_many:
            outputs = self._record(held, rows)
        else:
            with torch.no_grad():
                outputs = self._shard(torch.from_numpy(rows))
        return Product(self._encoded(batch_of(outputs), self._codec))

    def backward(self, held: Held, data: bytes | bytearray, codec: RowCodec) -> Product:
        """The gradients of a batch's rows, from those of its rows behind the core in `data`.

        Raises BadRows for values that are not finite.
        """
        gradients = wire.decode(data, held.sequences, held.length, codec)
        graph = self.activations.take(held)
        again = graph is None
        if graph is None:
            self.recomputed += 1
            fits = held.graph_bytes is not None and held.graph_bytes <= self.activations.free
            graph = Graph.record(self._shard, self._rows(held), checkpointing=not fits)
        return Product(self._encoded(graph.back(gradients), codec), again)

    def _record(self, held: Held, rows: Batch) -> torch.Tensor:
        """The rows behind the core, and a graph for the way back if the budget has room for it."""
        graph = Graph.record(self._shard, rows, self.activations.make_room)
        if graph.whole:
            held.graph_bytes = graph.size
            self.activations.put(held, graph)
        else:
            self._too_many = held.rows
        return graph.outputs

    def _rows(self, held: Held) -> Batch:
        return wire.decode(held.data, held.sequences, held.length, self._codec)

    def _encoded(self, batch: Batch, codec: RowCodec) -> bytes:
        try:
            return wire.encode(batch, codec)
        except BadRows as error:
            raise BadRows(f"what the core computed: {error.message}: {ADVICE}") from None
