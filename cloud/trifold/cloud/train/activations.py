"""What autograd keeps of a batch on its way forward, within a budget of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch.autograd.graph import saved_tensors_hooks

from trifold.shared.training.shard import TorchShard, batch_of
from trifold.shared.training.wire import Batch

Room = Callable[[int], bool]
"""Asked whether a graph may have so many bytes in all."""


@dataclass(eq=False)
class Held:
    """A batch for which gradients may come: the encoded rows of `sequences` of `length`, until `released`.

    `graph_bytes` are those of its graph, where it has had a whole one.
    """

    data: bytes | bytearray
    sequences: int
    length: int
    released: bool = False
    graph_bytes: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.sequences, self.length

    @property
    def rows(self) -> int:
        return self.sequences * self.length


@dataclass(frozen=True)
class Graph:
    """A batch that went forward: what is needed to go back, in so many bytes besides the weights.

    One that is not `whole` had no room, and cannot go back.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    size: int
    whole: bool

    @classmethod
    def record(
        cls, shard: TorchShard, rows: Batch, room: Room = lambda size: True, *, checkpointing: bool = False
    ) -> Self:
        """Takes rows (sequences, length, hidden) through the shard, and keeps its graph if there is `room`.

        With `checkpointing` that is the inputs of the layers alone; going back takes what one layer needs on
        top of them.
        """
        shard.checkpointing = checkpointing
        tape = _Tape(shard, room)
        inputs = torch.from_numpy(rows).to(shard.device).requires_grad_()
        tape.count(inputs)
        with saved_tensors_hooks(tape.save, _Saved.load):
            outputs = shard(inputs)
        tape.count(outputs)
        return cls(inputs, outputs, tape.size, tape.whole)

    def back(self, gradients: Batch) -> Batch:
        """Gradients of the inputs from those of the outputs, once."""
        arrived = torch.from_numpy(gradients).to(self.outputs)
        (found,) = torch.autograd.grad(self.outputs, self.inputs, arrived)
        return batch_of(found)


class _Saved:
    """A tensor that autograd saves, which may be taken from it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor | None = tensor

    def load(self) -> torch.Tensor:
        assert self.tensor is not None, "a graph that is not whole goes nowhere"
        return self.tensor


class _Tape:
    """What autograd saves as long as there is room, and none of it from then on."""

    def __init__(self, shard: TorchShard, room: Room) -> None:
        self.size = 0
        self.whole = True
        self._room = room
        self._saved: list[_Saved] = []
        # By address: several tensors may share memory, and that of those counted is not freed meanwhile.
        self._counted = {_address(weight) for weight in (*shard.parameters(), *shard.buffers())}

    def save(self, tensor: torch.Tensor) -> _Saved:
        # Detached: an output that its own node refers to would never be freed.
        saved = _Saved(tensor.detach())
        self._saved.append(saved)
        self.count(tensor)
        if not self.whole:
            for each in self._saved:
                each.tensor = None
            self._saved.clear()
        return saved

    def count(self, tensor: torch.Tensor) -> None:
        if self.whole and _address(tensor) not in self._counted:
            self._counted.add(_address(tensor))
            self.size += tensor.untyped_storage().nbytes()
            self.whole = self._room(self.size)


class Activations:
    """Graphs of the batches held, `limit` bytes of them at most: the oldest is given up first.

    Used by the engine's thread and, where a batch is released, by the event loop.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._graphs: OrderedDict[Held, Graph] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        """Bytes for which nothing has to be given up."""
        return self.limit - self.size

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
        """Keeps a graph that room was made for, unless the batch was released while it was computed."""
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


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
