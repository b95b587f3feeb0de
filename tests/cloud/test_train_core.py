from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.cloud.trainings import LENGTH, MEMORY, SEQUENCES, shard, some
from tests.shared.sites import floats, train_bundle
from trifold.cloud.train import accelerator
from trifold.cloud.train.activations import Graph, Held
from trifold.cloud.train.core import FrozenCore
from trifold.shared.bundle.manifest import Cuts
from trifold.shared.errors import BadRows
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.training import wire
from trifold.shared.training.shard import TorchShard
from trifold.shared.training.site import LocalCore
from trifold.shared.training.wire import Batch

CODEC = RowCodec("int8", 64)
FP32 = RowCodec("none", 64)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bundle("deepseek_v3", tmp_path_factory.mktemp("train"))[1]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bundle("qwen3_moe", tmp_path_factory.mktemp("mixture"))[1]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All layers in the core."""
    return train_bundle("qwen3_moe", tmp_path_factory.mktemp("deep"), cuts=Cuts(edge=0, cloud=4))[1]


def held(seed: int = 0, length: int = LENGTH, codec: RowCodec = CODEC) -> Held:
    return Held(wire.encode(some(codec, seed, length=length), codec), SEQUENCES, length)


def cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


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


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes that results of torch's operations took at a time, `weights` aside."""

    def __init__(self, core: TorchShard) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self._weights = {weight.untyped_storage().data_ptr() for weight in core.parameters()}
        self._alive: dict[Any, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._weights:
                    ref: Any = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                    self._alive[ref] = storage.nbytes()
        self._alive = {ref: size for ref, size in self._alive.items() if not ref.expired()}
        self.bytes = max(self.bytes, sum(self._alive.values()))
        return result


def peaks(core: FrozenCore, batch: Held, back: bytes) -> tuple[int, int]:
    """The most that a batch takes forward, and back."""
    with Peak(core._shard) as forward:
        core.forward(batch, keep=True)
    with Peak(core._shard) as backward:
        core.backward(batch, back, CODEC)
    return forward.bytes, backward.bytes


def test_no_batch_takes_more_than_the_budget_and_what_one_layer_needs(deep: Path) -> None:
    core, back = shard(deep), wire.encode(some(CODEC, 9, length=64), CODEC)
    whole = Graph.record(core, some(CODEC, length=64)).size
    with Peak(core) as passing, torch.no_grad():
        core(torch.from_numpy(some(CODEC, length=64)))
    for memory in (0, whole // 2):
        frozen = FrozenCore(core, CODEC, memory)
        # The first of its shape, and another one of which it is known that it does not fit.
        for _ in range(2):
            forward, backward = peaks(frozen, held(length=64), back)
            assert forward <= memory + 1.1 * passing.bytes
            assert backward < 0.6 * whole
    ample = FrozenCore(core, CODEC, whole)
    forward, backward = peaks(ample, held(length=64), back)
    assert forward > whole
    assert ample.recomputed == 0


def test_a_batch_computed_again_takes_what_is_free_and_pushes_nobody_out(deep: Path) -> None:
    back, size = gradients(), size_of(deep)
    for memory, forward_again in ((2 * size, 0), (2 * size - 1, 1)):
        core = FrozenCore(shard(deep), CODEC, memory)
        first, other = held(1), held(2)
        core.forward(first, keep=True)
        graph = core.activations.take(first)
        core.forward(other, keep=True)
        with Peak(core._shard) as peak:
            core.backward(first, back, CODEC)
        assert (peak.bytes < size) == bool(forward_again)
        assert not core.backward(other, back, CODEC).recomputed
        del graph


def test_a_batch_that_does_not_fit_is_found_out_once_and_pushes_nobody_out_again(deep: Path) -> None:
    core = FrozenCore(shard(deep), CODEC, 2 * size_of(deep))
    small, large = held(1), held(2, length=8 * LENGTH)
    core.forward(large, keep=True)
    core.forward(small, keep=True)
    core.forward(large, keep=True)
    assert not core.backward(small, gradients(), CODEC).recomputed


def test_on_several_threads_a_batch_has_the_same_gradients_each_time(bundle: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows, given = (some(CODEC, seed, sequences=40, length=256) for seed in (0, 9))
        found = [Graph.record(shard(bundle), rows).back(given) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(found[0], again) for again in found)


def test_layer_by_layer_the_gradients_are_the_same_bits(deep: Path) -> None:
    for seed in range(3):
        products = []
        for memory in (MEMORY, 0):
            core, batch = FrozenCore(shard(deep), CODEC, memory), held(seed)
            forward = core.forward(batch, keep=True)
            products.append((forward.data, core.backward(batch, gradients(), CODEC).data))
        assert products[0] == products[1]


def test_a_core_in_bfloat16_gives_nearly_the_gradients_of_one_in_fp32(mixture: Path) -> None:
    half = TorchShard.load(floats(mixture, "cloud"), torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    found = []
    for core, memory in ((shard(mixture), MEMORY), (half, MEMORY), (half, 0)):
        frozen, batch = FrozenCore(core, FP32, memory), held(codec=FP32)
        rows = frozen.forward(batch, keep=True)
        assert (frozen.activations.size > 0) == (memory > 0)
        product = frozen.backward(batch, wire.encode(some(FP32, 9), FP32), FP32)
        found.append([np.frombuffer(data, np.float32) for data in (rows.data, product.data)])
    for exact, near, again in zip(*found, strict=True):
        assert not np.array_equal(exact, near)
        assert cosine(exact, near) > 0.99
        assert np.array_equal(near, again)


def test_a_graph_in_bfloat16_is_counted_at_half_the_bytes(mixture: Path) -> None:
    half = TorchShard.load(floats(mixture, "cloud"), torch.bfloat16)
    assert Graph.record(half, some(CODEC)).size < 0.75 * size_of(mixture)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_core_on_a_gpu_gives_nearly_the_gradients_of_one_on_the_cpu(
    mixture: Path, dtype: torch.dtype
) -> None:
    core = TorchShard.load(floats(mixture, "cloud"), dtype, accelerator.find("cuda"))
    assert {weight.device.type for weight in (*core.parameters(), *core.buffers())} == {"cuda"}
    found = []
    for frozen in (FrozenCore(shard(mixture), FP32, MEMORY), FrozenCore(core, FP32, MEMORY)):
        batch = held(codec=FP32)
        rows = frozen.forward(batch, keep=True)
        product = frozen.backward(batch, wire.encode(some(FP32, 9), FP32), FP32)
        found.append([np.frombuffer(data, np.float32) for data in (rows.data, product.data)])
    graph = Graph.record(core, some(CODEC))
    assert {graph.inputs.device.type, graph.outputs.device.type} == {"cuda"}
    # What the budget counts is what the GPU's memory takes, to the granularity of its allocator.
    taken = torch.cuda.memory_allocated()
    size = graph.size
    del graph
    assert size <= taken - torch.cuda.memory_allocated() < 4 * size
    for exact, near in zip(*found, strict=True):
        assert cosine(exact, near) > 0.99


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
    sizes = [Graph.record(shard(bundle), some(CODEC, length=length)).size for length in (4, 8, 16, 256)]
    assert 4 * 64 * SEQUENCES * LENGTH < sizes[1] < weights
    # In proportion to the rows: attention keeps no matrix of all positions by all positions.
    assert sizes[2] / sizes[1] == pytest.approx(2, rel=0.01)
    assert sizes[3] / sizes[1] == pytest.approx(32, rel=0.01)


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


def test_values_that_the_core_makes_infinite_are_told_with_what_to_do(bundle: Path) -> None:
    loud = TorchShard.load(floats(bundle, "cloud"))
    with torch.no_grad():
        for weight in loud.parameters():
            weight.mul_(1e18)
    core = FrozenCore(loud, FP32, MEMORY)
    with pytest.raises(BadRows, match=r"what the core computed: .* take a lower learning rate"):
        core.forward(held(codec=FP32), keep=True)
