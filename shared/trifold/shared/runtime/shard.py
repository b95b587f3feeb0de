"""Shard: what one tier computes, and Cache: the keys and values it keeps for a session."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import trifold.shared.runtime.untold  # noqa: F401  # isort: skip - before onnxruntime

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from trifold.shared.bundle.folder import Progress, TierFolder
from trifold.shared.bundle.manifest import Tier
from trifold.shared.errors import InvalidRequest, OutOfSequence, TrifoldError
from trifold.shared.model.heads import HeadLayout
from trifold.shared.runtime.engine import PROVIDER, WEIGHTS, load, placement
from trifold.shared.runtime.fingerprint import fingerprint
from trifold.shared.runtime.rotation import rotation
from trifold.shared.runtime.selftest import prove, some_rows, some_tokens

Rows = NDArray[np.float32]
Tokens = NDArray[np.int64]
Positions = NDArray[np.int64]

MODEL: Final = "model.onnx"

COPIES: Final = 1
"""Rows that attention gets beyond those asked for, at least. Why: trifold.cloud.split.graph.attention."""

WIDE_HEAD: Final = 128
WIDE_POSITIONS: Final = 65
"""Heads of more values than WIDE_HEAD need at least so many positions in every call."""

MOST_SCORES: Final = 2**24
"""Attention scores held at once: 64 MiB."""

_MOST_ROWS: Final = 4096
"""Rows in one call to a graph without attention."""

_FEW_ROWS: Final = 8
_FEW_CALLS: Final = 8
"""A cache keeps the memory of calls of few rows, which come again and again while decoding."""


@dataclass(frozen=True)
class Call:
    """Memory that is bound to the inputs and outputs of a graph, for calls of one shape."""

    binding: ort.IOBinding
    inputs: NDArray[Any]
    output: Rows
    positions: Positions
    last_position: NDArray[np.int32]
    position_count: NDArray[np.int32]


class Cache:
    """Keys and values of the positions [0, have) of a session, with room for `capacity`.

    Made by a shard, good for that one alone and for one call at a time.
    """

    def __init__(self, capacity: int, bound: dict[str, ort.OrtValue]) -> None:
        self.capacity = capacity
        self.have = 0
        self.bound = bound
        self.calls: dict[tuple[int, ...], Call] = {}


class Shard:
    """A tier of a bundle, loaded and tested.

    `attends`: it has attention layers, and so needs every row of a session in order. `exact`: the self-test
    found that rows do not depend on how they are cut into calls.
    """

    def __init__(
        self,
        folder: TierFolder,
        *,
        threads: int = 0,
        provider: str = PROVIDER,
        progress: Progress = lambda done, total: None,
    ) -> None:
        """Loads without proving; `load` does both. What `provider` cannot run, the CPU does."""
        serving = folder.manifest.serving
        self.tier: Tier = folder.tier
        self.spec = serving.spec
        self.hidden = self.spec.hidden
        self.vocab = self.spec.vocab
        self.provider = provider
        self.exact = False
        self.fingerprint = ""
        layers = [self.spec.layers[index] for index in serving.cuts.layers(self.tier, len(self.spec.layers))]
        self.attends = bool(layers)
        self._heads = max((layer.attention.heads for layer in layers), default=0)
        wide = any(HeadLayout.of(layer.attention).size > WIDE_HEAD for layer in layers)
        self._fewest_positions = WIDE_POSITIONS if wide else 0
        with folder.mapped(WEIGHTS, progress) as weights:
            self._session = load(folder.read(MODEL), weights, threads=threads, provider=provider)
        self._caches = {
            value.name: (value.shape[1], value.shape[3])
            for value in self._session.get_inputs()
            if value.name.startswith("past_")
        }
        # What was a key and a value lies where the graph takes it from; one latent is both.
        presents = [value.name for value in self._session.get_outputs() if value.name.startswith("present_")]
        self._kept = {
            name: past if (past := name.replace("present", "past")) in self._caches else _latent(name)
            for name in presents
        }
        self._rotation: dict[str, ort.OrtValue] = {}

    @classmethod
    def load(
        cls, folder: TierFolder, *, threads: int = 0, progress: Progress = lambda done, total: None
    ) -> Shard:
        """The shard of a folder, on `threads` threads or on one for each physical core (0), proved.

        `progress` hears of the weights checked. Raises DamagedFile when a file is not what the manifest says
        or cannot be loaded.
        """
        shard = cls(folder, threads=threads, progress=progress)
        positions = shard.spec.max_positions
        result = prove(
            some_tokens(shard.vocab, positions)
            if shard.tier == "edge"
            else some_rows(shard.hidden, positions),
            shard.cache,
            lambda parts: [shard.run(*part) for part in parts],
        )
        shard.exact = result.exact
        shard.fingerprint = fingerprint(shard.provider, result.digest)
        return shard

    @property
    def placement(self) -> dict[str, int]:
        """How many nodes of the graph each execution provider runs."""
        return placement(self._session)

    def cache_bytes(self, capacity: int) -> int:
        """Memory of a cache for so many positions."""
        return sum(4 * self._slots(capacity) * heads * size for heads, size in self._caches.values())

    def cache(self, capacity: int) -> Cache:
        """An empty cache for the positions [0, capacity)."""
        slots = self._slots(capacity)
        bound = {
            name: value_of(np.zeros((1, heads, slots, size), np.float32))
            for name, (heads, size) in self._caches.items()
        }
        return Cache(capacity, bound | (self._tables(slots) if self.attends else {}))

    def release(self, cache: Cache) -> None:
        """Nothing has to be done: a cache's memory goes with it."""

    def run(self, cache: Cache, inputs: Tokens | Rows, base_pos: int, logits_from: int | None = None) -> Rows:
        """Compute the rows at base_pos, base_pos + 1, …, after forgetting what the cache holds from there on.

        `inputs` are token ids (n,) for the edge, rows (n, hidden) for others. Returns rows (n, hidden) or,
        on the device, logits (m, vocab) of the positions from `logits_from` on, by default of all.

        Raises OutOfSequence when positions before base_pos are missing, InvalidRequest for a shape, dtype,
        position or token id that cannot be.
        """
        self._check(cache, inputs, base_pos)
        end = base_pos + len(inputs)
        chosen_from = base_pos if logits_from is None or self.tier != "device" else logits_from
        if not base_pos <= chosen_from <= end:
            raise InvalidRequest(f"logits from position {logits_from} on of rows {base_pos} to {end - 1}")
        cache.have = min(cache.have, base_pos)
        if self.tier == "device" and not self.attends:
            inputs, base_pos = inputs[chosen_from - base_pos :], chosen_from
        step = self._rows_at_once(cache)
        parts = [
            self._compute(cache, inputs[start : start + step], base_pos + start, chosen_from)
            for start in range(0, len(inputs), step)
        ]
        cache.have = end
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty((0, self.vocab), np.float32)

    def _check(self, cache: Cache, inputs: Tokens | Rows, base_pos: int) -> None:
        shape, dtype = ((), np.int64) if self.tier == "edge" else ((self.hidden,), np.float32)
        if len(inputs) == 0 or inputs.shape[1:] != shape or inputs.dtype != dtype:
            wanted = f"{np.dtype(dtype).name} {('n', *shape)}"
            raise InvalidRequest(
                f"the {self.tier} shard takes {wanted}, not {inputs.dtype.name} {inputs.shape}"
            )
        end = base_pos + len(inputs)
        if base_pos < 0 or end > cache.capacity:
            raise InvalidRequest(f"positions {base_pos} to {end - 1} in a session of {cache.capacity}")
        if self.attends and base_pos > cache.have:
            raise OutOfSequence(f"rows from position {base_pos} on, but only {cache.have} positions are here")
        if self.tier == "edge" and not (inputs.min() >= 0 and inputs.max() < self.vocab):
            raise InvalidRequest(f"token ids must be from 0 to {self.vocab - 1}")

    def _rows_at_once(self, cache: Cache) -> int:
        """A call is cut, which changes no bits, where scores of all heads, rows and slots are too many."""
        if not self.attends:
            return _MOST_ROWS
        return max(1, MOST_SCORES // (self._heads * self._slots(cache.capacity)))

    def _compute(self, cache: Cache, inputs: Tokens | Rows, base_pos: int, chosen_from: int) -> Rows:
        end = base_pos + len(inputs)
        copies = max(COPIES, self._fewest_positions - end)
        chosen = end - max(base_pos, chosen_from)
        shape = (len(inputs), copies, max(1, chosen))
        call = cache.calls.get(shape) or self._bind(cache, *shape)
        again = len(inputs) <= _FEW_ROWS
        if again and shape not in cache.calls:
            if len(cache.calls) == _FEW_CALLS:
                cache.calls.pop(next(iter(cache.calls)))
            cache.calls[shape] = call
        call.inputs[...] = inputs
        call.positions[...] = np.arange(base_pos, end)
        call.last_position[0] = end + copies - 1
        call.position_count[...] = end + copies
        try:
            self._session.run_with_iobinding(call.binding)
        except Exception as error:
            raise TrifoldError(f"the {self.tier} shard failed at position {base_pos}: {error}") from error
        output = call.output.copy() if again else call.output
        return output if chosen > 0 else output[:0]

    def _bind(self, cache: Cache, rows: int, copies: int, chosen: int) -> Call:
        """New memory for calls of `rows` rows with `copies` of the last, and logits of the last `chosen`."""
        tokens, device = self.tier == "edge", self.tier == "device"
        inputs = np.zeros(rows, np.int64) if tokens else np.zeros((rows, self.hidden), np.float32)
        output = np.empty((chosen, self.vocab) if device else (rows, self.hidden), np.float32)
        positions = np.zeros(rows, np.int64)
        last_position, position_count = np.zeros(1, np.int32), np.zeros((), np.int32)
        binding = self._session.io_binding()
        values = {
            "tokens" if tokens else "rows": value_of(inputs[:, None]),
            "attend": value_of(np.minimum(np.arange(rows + copies), rows - 1)),
            "row_count": value_of(np.array([rows])),
            "positions": value_of(positions[None]),
            "last_position": value_of(last_position),
            "position_count": value_of(position_count),
            "logits_from": value_of(np.array([rows - chosen])),
            **cache.bound,
        }
        for wanted in self._session.get_inputs():
            binding.bind_ortvalue_input(wanted.name, values[wanted.name])
        for present, past in self._kept.items():
            binding.bind_ortvalue_output(present, cache.bound[past])
        binding.bind_ortvalue_output("logits" if device else "rows_out", value_of(output[:, None]))
        return Call(binding, inputs, output, positions, last_position, position_count)

    def _slots(self, capacity: int) -> int:
        """Positions that a cache has memory for: copies of the last row go behind it."""
        return max(capacity + COPIES, self._fewest_positions)

    def _tables(self, positions: int) -> dict[str, ort.OrtValue]:
        """cos and sin for at least so many positions, shared by caches."""
        if not self._rotation or self._rotation["cos"].shape()[0] < positions:
            cos, sin = rotation(self.spec.rope, max(positions, 1024))
            self._rotation = {"cos": value_of(cos), "sin": value_of(sin)}
        return self._rotation


def _latent(present: str) -> str:
    """The cache of the layer of an output."""
    return f"past_latent_{present.rpartition('_')[2]}"


def value_of(array: NDArray[Any]) -> ort.OrtValue:
    """The memory of an array, for ONNX Runtime to read and write."""
    return ort.OrtValue.ortvalue_from_numpy(array)
