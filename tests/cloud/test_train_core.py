from __future__ import annotations

import gc
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.cloud.trainings import LENGTH, MEMORY, SEQUENCES, shard, some
from tests.shared.sites import train_bundle
from trifold.cloud.train.activations import Graph, Held
from trifold.cloud.train.core import FrozenCore
from trifold.shared.errors import BadRows
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.training import wire
from trifold.shared.training.site import LocalCore
from trifold.shared.training.wire import Batch

CODEC = RowCodec("int8", 64)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bundle("deepseek_v3", tmp_path_factory.mktemp("train"))[1]


def held(seed: int = 0, length: int = LENGTH) -> Held:
    return Held(wire.encode(some(CODEC, seed, length=length), CODEC), SEQUENCES, length)


def gradients(seed: int = 9) -> bytes:
    return wire.encode(some(CODEC, seed), CODEC)


def expected(bundle: Path, seed: int = 0) -> tuple[Batch, Batch]:
    """Rows and gradients by a core without a wire."""
    local = LocalCore(shard(bundle), CODEC, CODEC)
    batch, rows = local.forward(some(CODEC, seed), keep=True)
    return rows, local.backward(batch, some(CODEC, 9))


def size_of(bundle: Path) -> int:
    """What one batch takes."""
    return Graph.record(shard(bundle), some(CODEC)).size


@pytest.mark.parametrize("memory", [MEMORY, 0])
def test_kept_or_computed_again_a_batch_gives_the_same_bits(bundle: Path, memory: int) -> None:
    core = FrozenCore(shard(bundle), CODEC, memory)
    rows, back = expected(bundle)
    for _ in range(2):
        batch = held()
        forward = core.forward(batch, keep=True)
        assert np.array_equal(wire.decode(forward.data, SEQUENCES, LENGTH, CODEC), rows)
        product = core.backward(batch, gradients(), CODEC)
        assert np.array_equal(wire.decode(product.data, SEQUENCES, LENGTH, CODEC), back)
        assert product.recomputed == (memory == 0)
        assert core.activations.size == 0
    assert core.recomputed == (2 if memory == 0 else 0)


def test_the_oldest_batch_is_given_up_first_and_the_budget_is_never_exceeded(bundle: Path) -> None:
    core = FrozenCore(shard(bundle), CODEC, 2 * size_of(bundle))
    batches = [held(seed) for seed in range(4)]
    for batch in batches:
        core.forward(batch, keep=True)
        assert core.activations.size <= core.activations.limit
    again = [core.backward(batch, gradients(), CODEC).recomputed for batch in batches]
    assert again == [True, True, False, False]


def test_activations_are_counted_without_the_weights_and_grow_with_the_batch(bundle: Path) -> None:
    weights = sum(weight.nbytes for weight in shard(bundle).parameters())
    sizes = [Graph.record(shard(bundle), some(CODEC, length=length)).size for length in (4, 8, 16)]
    assert 4 * 64 * SEQUENCES * LENGTH < sizes[1] < weights
    # The mask of attention grows with the square of the length.
    assert sizes == sorted(sizes)
    assert sizes[1] - sizes[0] < sizes[2] - sizes[1]


def test_nothing_is_kept_for_a_batch_that_no_gradients_will_come_for(bundle: Path) -> None:
    core = FrozenCore(shard(bundle), CODEC, MEMORY)
    product = core.forward(held(), keep=False)
    assert core.activations.size == 0
    assert np.array_equal(wire.decode(product.data, SEQUENCES, LENGTH, CODEC), expected(bundle)[0])


def test_what_is_given_up_is_freed(bundle: Path) -> None:
    core = FrozenCore(shard(bundle), CODEC, MEMORY)
    batch, other = held(), held(1)
    gc.collect()
    gc.disable()
    try:
        core.forward(batch, keep=True)
        graph = core.activations.take(batch)
        assert graph is not None
        refs = [weakref.ref(graph.inputs), weakref.ref(graph.outputs)]
        del graph
        # By counting references alone: a cycle would hold the memory until the collector comes by.
        assert [ref() for ref in refs] == [None, None]
    finally:
        gc.enable()
    core.forward(other, keep=True)
    core.activations.release(other)
    assert core.activations.size == 0


def test_a_batch_released_while_it_was_computed_is_not_kept(bundle: Path) -> None:
    core = FrozenCore(shard(bundle), CODEC, MEMORY)
    batch = held()
    core.activations.release(batch)
    core.forward(batch, keep=True)
    assert core.activations.size == 0


def test_values_that_are_not_finite_are_refused(bundle: Path) -> None:
    core = FrozenCore(shard(bundle), CODEC, MEMORY)
    batch = held()
    broken = bytearray(batch.data)
    broken[: 4 * 64] = np.full(2 * 64, np.nan, ml_dtypes.bfloat16).tobytes()
    with pytest.raises(BadRows, match="not finite"):
        core.forward(Held(bytes(broken), SEQUENCES, LENGTH), keep=True)
    core.forward(batch, keep=True)
    with pytest.raises(BadRows, match="not finite"):
        core.backward(batch, bytes(broken), CODEC)
