"""What autograd keeps of a batch on its way forward, within a budget of bytes."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch.autograd.graph import saved_tensors_hooks

from trifold.shared.training.shard import TorchShard
from trifold.shared.training.wire import Batch


@dataclass(eq=False)
class Held:
    """A batch for which gradients may come: the encoded rows of `sequences` of `length`, until `released`."""

    data: bytes
    sequences: int
    length: int
    released: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.sequences, self.length


@dataclass(frozen=True)
class Graph:
    """A batch that went forward: what is needed to go back, in so many bytes besides the weights."""

    inputs: torch.Tensor
    outputs: torch.Tensor
    size: int

    @classmethod
    def record(cls, shard: TorchShard, rows: Batch) -> Self:
        """Takes rows (sequences, length, hidden) through the shard."""
        saved: list[weakref.ref[torch.Tensor]] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            # Detached: an output that its own node refers to would never be freed.
            kept = tensor.detach()
            saved.append(weakref.ref(kept))
            return kept

        inputs = torch.from_numpy(rows).requires_grad_()
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = shard(inputs)
        storages = _storages([inputs, outputs, *(kept for ref in saved if (kept := ref()) is not None)])
        weights = _storages([*shard.parameters(), *shard.buffers()])
        return cls(inputs, outputs, sum(storages[place] for place in storages.keys() - weights))

    def back(self, gradients: Batch) -> Batch:
        """Gradients of the inputs from those of the outputs, once."""
        (result,) = torch.autograd.grad(self.outputs, self.inputs, torch.from_numpy(gradients))
        return result.numpy()


class Activations:
    """Graphs of the batches held, `limit` bytes of them at most: the oldest is given up first.

    Used by the engine's thread and, where a batch is released, by the event loop.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._graphs: OrderedDict[Held, Graph] = OrderedDict()
        self._lock = threading.Lock()

    def make_room(self, size: int) -> bool:
        """Gives up as many as needed for `size` more bytes; False when that is beyond the limit anyway."""
        if size > self.limit:
            return False
        with self._lock:
            while self._graphs and self.size + size > self.limit:
                _, graph = self._graphs.popitem(last=False)
                self.size -= graph.size
        return True

    def put(self, held: Held, graph: Graph) -> None:
        """Keeps a graph, if the limit allows it and nobody has released the batch while it was computed."""
        if not self.make_room(graph.size):
            return
        with self._lock:
            if not held.released:
                self._graphs[held] = graph
                self.size += graph.size

    def take(self, held: Held) -> Graph | None:
        """The graph of a batch, kept no longer; None when it has been given up."""
        with self._lock:
            graph = self._graphs.pop(held, None)
            self.size -= graph.size if graph else 0
        return graph

    def release(self, held: Held) -> None:
        """Nobody will ask for this batch any more."""
        held.released = True
        self.take(held)


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """The bytes of the memory behind tensors, by its address: several may share it."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
