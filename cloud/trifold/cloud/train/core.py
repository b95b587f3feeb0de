"""FrozenCore: rows of a batch forward, gradients back, and as little kept in between as the budget says."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trifold.cloud.train.activations import Activations, Graph, Held
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.training import wire
from trifold.shared.training.shard import TorchShard
from trifold.shared.training.wire import Batch


@dataclass(frozen=True, slots=True)
class Product:
    """A batch of rows or gradients, encoded, and whether the batch had to go forward once more for it."""

    data: bytes
    recomputed: bool = False


class FrozenCore:
    """The layers of the cloud in torch; its weights do not change. All methods are for one thread.

    What a batch takes to go back is known from the first of its shape: room is made ahead of the next, and
    one that would not fit goes forward without keeping anything. A batch that goes forward once more takes
    its room beyond the budget for that turn: were others to give way, they would have to do the same.
    """

    def __init__(self, shard: TorchShard, codec: RowCodec, memory: int) -> None:
        """Rows travel in `codec`; activations may take `memory` bytes."""
        self.activations = Activations(memory)
        self.recomputed = 0
        self._shard = shard
        self._codec = codec
        self._sizes: dict[tuple[int, int], int] = {}

    def forward(self, held: Held, *, keep: bool) -> Product:
        """The rows behind the core. Raises BadRows for values that are not finite."""
        rows = self._rows(held)
        if keep and self.activations.make_room(self._sizes.get(held.shape, 0)):
            graph = self._record(held, rows)
            self.activations.put(held, graph)
            outputs = graph.outputs.detach()
        else:
            with torch.no_grad():
                outputs = self._shard(torch.from_numpy(rows))
        return Product(wire.encode(outputs.numpy(), self._codec))

    def backward(self, held: Held, data: bytes, codec: RowCodec) -> Product:
        """The gradients of a batch's rows, from those of its rows behind the core in `data`.

        Raises BadRows for values that are not finite.
        """
        gradients = wire.decode(data, held.sequences, held.length, codec)
        graph = self.activations.take(held)
        again = graph is None
        if graph is None:
            self.recomputed += 1
            graph = self._record(held, self._rows(held))
        return Product(wire.encode(graph.back(gradients), codec), again)

    def _record(self, held: Held, rows: Batch) -> Graph:
        graph = Graph.record(self._shard, rows)
        self._sizes[held.shape] = graph.size
        return graph

    def _rows(self, held: Held) -> Batch:
        return wire.decode(held.data, held.sequences, held.length, self._codec)
