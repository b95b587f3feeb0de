"""SiteModel: the whole model as a site trains it, its core somewhere else."""

from __future__ import annotations

from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from trifold.shared.errors import ConfigError
from trifold.shared.runtime.codec import LARGEST, RowCodec
from trifold.shared.training.cache import RowCache
from trifold.shared.training.diverged import ADVICE, TrainingDiverged
from trifold.shared.training.shard import TorchShard, batch_of
from trifold.shared.training.wire import Batch, through

Tokens = NDArray[np.int64]
"""Token ids (sequences, length + 1): each predicts the next, so the model sees `length` of them."""


class Core(Protocol):
    """The frozen middle of the model. Implementations apply the codecs: what they give is what arrives.

    Blocking, used from one thread. Arrays are float32 (sequences, length, hidden); numpy, so that a client of
    a remote core needs no torch.
    """

    def forward(self, rows: Batch, *, keep: bool) -> tuple[int, Batch]:
        """The core's rows for the edge's, and a number for `backward`, which will follow if `keep`."""
        ...

    def backward(self, batch: int, gradients: Batch) -> Batch:
        """Gradients of the edge's rows from those of the core's rows. A batch goes back once."""
        ...


class LocalCore:
    """The core in this process, with the codecs of the wire: for tests and for centralized training."""

    def __init__(self, shard: TorchShard, rows: RowCodec, gradients: RowCodec) -> None:
        self._shard = shard
        self._rows = rows
        self._gradients = gradients
        self._numbers = count()
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(self, rows: Batch, *, keep: bool) -> tuple[int, Batch]:
        """As Core says. Raises BadRows for values not finite."""
        inputs = torch.from_numpy(through(rows, self._rows)).requires_grad_(keep)
        mixed = torch.autocast(self._shard.device.type, enabled=False)  # the site's, not the core's
        with torch.set_grad_enabled(keep), mixed:
            outputs = self._shard(inputs)
        batch = next(self._numbers)
        if keep:
            self._kept[batch] = inputs, outputs
        return batch, through(batch_of(outputs), self._rows)

    def backward(self, batch: int, gradients: Batch) -> Batch:
        """As Core says. Raises BadRows for values not finite."""
        inputs, outputs = self._kept.pop(batch)
        arrived = torch.from_numpy(through(gradients, self._gradients)).to(outputs)
        (found,) = torch.autograd.grad(outputs, inputs, arrived)
        return through(batch_of(found), self._gradients)


class SiteModel:
    """Edge and device shards around a core.

    Where only the device has LoRA, no gradient is asked of the core: `keep` is False, no `backward` follows.
    With a `cache` its rows are then computed once, in fp32 whatever the precision of the training, and read
    back whenever the same tokens come again.
    """

    def __init__(
        self, edge: TorchShard, device: TorchShard, core: Core, cache: RowCache | None = None
    ) -> None:
        """Raises ConfigError for a cache beside LoRA on the edge, which changes the rows at every step."""
        self.edge = edge
        self.device = device
        self.core = core
        self.shards = (edge, device)
        self._cache = cache
        if cache and _trained(edge):
            raise ConfigError("rows can be kept only where the device alone has LoRA: leave out the cache")

    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained, in a fixed order."""
        return [*_trained(self.edge), *_trained(self.device)]

    def loss(self, tokens: Tokens) -> torch.Tensor:
        """The mean cross entropy of the next token in nats, over (sequences, length + 1) token ids.

        Raises TrainingDiverged when the edge's rows are not finite, and so does going back from the loss when
        the gradients of the core's rows are not.
        """
        logits = self.device(self._core_rows(tokens[:, :-1])).float()
        labels = torch.from_numpy(tokens[:, 1:].astype(np.int64)).to(logits.device)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def _core_rows(self, tokens: Tokens) -> torch.Tensor:
        """The rows that the device works on, for token ids (sequences, length)."""
        if self._cache is None:
            return self._compute(tokens)
        known = [self._cache.get(sequence) for sequence in tokens]
        missing = [index for index, rows in enumerate(known) if rows is None]
        if missing:
            with torch.autocast(self.edge.device.type, enabled=False):
                computed = batch_of(self._compute(tokens[missing]))
            for index, rows in zip(missing, computed, strict=True):
                known[index] = self._cache.put(tokens[index], rows)
        return torch.from_numpy(np.stack([rows for rows in known if rows is not None]))

    def _compute(self, tokens: Tokens) -> torch.Tensor:
        rows = self.edge(torch.from_numpy(tokens.astype(np.int64)))
        # Moved out here, where autograd moves the gradients back to where the edge computes.
        rows = rows.to("cpu", torch.float32)
        through_core: torch.Tensor = _ThroughCore.apply(rows, self.core)  # type: ignore[no-untyped-call]
        return through_core


class _ThroughCore(torch.autograd.Function):
    """Rows of the edge to rows of the core, in fp32 and main memory on both sides."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, core: Core) -> torch.Tensor:
        ctx.core = core
        ctx.batch, found = core.forward(_finite(rows, "the edge's rows"), keep=rows.requires_grad)
        return torch.from_numpy(found)

    @staticmethod
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        given = _finite(gradients, "the gradients of the core's rows")
        return torch.from_numpy(ctx.core.backward(ctx.batch, given)), None


def _trained(shard: TorchShard) -> list[nn.Parameter]:
    return [parameter for parameter in shard.parameters() if parameter.requires_grad]


def _finite(rows: torch.Tensor, what: str) -> Batch:
    """For a codec, which takes no others."""
    batch = batch_of(rows)
    if not (np.abs(batch) <= LARGEST).all():
        raise TrainingDiverged(f"{what} hold values that are not finite: {ADVICE}")
    return batch
