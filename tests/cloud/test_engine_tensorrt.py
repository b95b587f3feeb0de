"""The engine on TensorRT, as far as a machine without it can tell; its graph is run by ONNX Runtime here."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.cloud.tensorrt_graphs import CUTS, CoreGraph, by_the_float_model, core_graph, error, some_rows
from tests.shared.sites import train_bundle
from trifold.cloud.core.engines.engine import Part
from trifold.cloud.core.engines.tensorrt import batch, runner
from trifold.cloud.core.engines.tensorrt.device import Device
from trifold.cloud.core.engines.tensorrt.engine import TensorRtEngine
from trifold.cloud.core.engines.tensorrt.floats import check_floats, float_source
from trifold.cloud.core.engines.tensorrt.library import check_builder
from trifold.cloud.core.engines.tensorrt.profiles import Limits, sizes
from trifold.cloud.core.engines.tensorrt.slots import session_bytes
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import FLOATS
from trifold.shared.errors import (
    ConfigError,
    DamagedFile,
    InvalidRequest,
    OutOfSequence,
    UnknownSession,
)
from trifold.shared.runtime.shard import Rows

LIMITS = Limits(sessions=5, positions=200, rows=64)


class OnnxRunner:
    """The graph over the caches of all slots, by ONNX Runtime."""

    def __init__(self, graph: CoreGraph, limits: Limits) -> None:
        self._graph = graph
        self._limits = limits
        self.session_bytes = sum(cache[0].nbytes for cache in graph.caches.values())

    def clear(self, slot: int) -> None:
        for cache in self._graph.caches.values():
            cache[slot] = 0

    def decode(self, rows: Rows, positions: np.typing.NDArray[np.int64]) -> Rows:
        assert len(rows) in sizes(self._limits)
        assert positions.max() < self._limits.slots
        return self._graph.run(rows, positions, slice(len(rows)))

    def prompt(self, slot: int, rows: Rows, first: int) -> Rows:
        assert len(rows) <= self._limits.rows
        positions = first + np.arange(len(rows))[None]
        out: Rows = self._graph.run(rows[None], positions, slice(slot, slot + 1))[0]
        return out


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bundle("qwen3_moe", tmp_path_factory.mktemp("tensorrt"), cuts=CUTS)[1]


@pytest.fixture
def engine(bundle: Path, tmp_path: Path) -> TensorRtEngine:
    model = core_graph(bundle, tmp_path, LIMITS.slots)
    graph = CoreGraph.on_onnxruntime(model, tmp_path, LIMITS.sessions)
    return TensorRtEngine(OnnxRunner(graph, LIMITS), 64, LIMITS)


# --- Rows


def test_mixed_batches_give_each_session_the_rows_of_the_float_model(
    engine: TensorRtEngine, bundle: Path
) -> None:
    sessions = [some_rows(length, seed) for seed, length in enumerate((30, 90, 21, 40))]
    caches = [engine.cache(len(rows)) for rows in sessions]
    out: list[list[Rows]] = [[] for _ in sessions]
    steps = ((0, 5, 20, 1), (1, 70, 0, 1), (8, 1, 1, 1), (1, 1, 0, 33), (20, 13, 0, 4))
    at = [0] * len(sessions)
    for step in steps:
        present = [place for place, count in enumerate(step) if count]
        parts = [
            Part(caches[place], sessions[place][at[place] : at[place] + step[place]], at[place])
            for place in present
        ]
        for place, rows in zip(present, engine.run(parts), strict=True):
            out[place].append(rows)
            at[place] += step[place]
    assert at == [len(rows) for rows in sessions]
    assert [cache.have for cache in caches] == at
    assert error([np.concatenate(parts) for parts in out], by_the_float_model(bundle, sessions)) < 1e-4


def test_a_session_in_a_slot_that_another_left_finds_nothing_of_it(
    engine: TensorRtEngine, bundle: Path
) -> None:
    first = engine.cache(50)
    engine.run([Part(first, np.full((50, 64), np.nan, np.float32), 0)])
    engine.release(first)
    second, rows = engine.cache(20), some_rows(20, 3)
    assert second.slot == first.slot
    assert error(engine.run([Part(second, rows, 0)]), by_the_float_model(bundle, [rows])) < 1e-4
    with pytest.raises(UnknownSession):
        engine.run([Part(first, rows[:1], 0)])


def test_the_self_test_gives_its_caches_back_and_names_what_was_proved(engine: TensorRtEngine) -> None:
    engine.prove("tensorrt-11", "a card", "bf16")
    assert re.fullmatch("tensorrt-11/a card/bf16/[0-9a-f]{16}", engine.fingerprint)
    assert {engine.cache(10).slot for _ in range(LIMITS.sessions)} == set(range(LIMITS.sessions))


def test_what_cannot_be_is_refused_before_anything_is_computed(engine: TensorRtEngine) -> None:
    cache, rows = engine.cache(10), some_rows(11, 0)
    with pytest.raises(InvalidRequest):
        engine.run([Part(cache, rows, 0)])
    with pytest.raises(OutOfSequence):
        engine.run([Part(cache, rows[:1], 1)])
    with pytest.raises(InvalidRequest):
        engine.run([Part(cache, rows[:1, :32], 0)])
    assert cache.have == 0


def test_a_cache_takes_what_its_slot_takes(engine: TensorRtEngine) -> None:
    # Keys and values of four layers: two heads of 16 values, in fp32.
    assert engine.cache_bytes(1) == engine.cache_bytes(200) == 4 * 2 * LIMITS.slots * 2 * 16 * 4


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_memory_for_sessions_is_counted_as_the_graph_takes_it(family: str, tmp_path: Path) -> None:
    _, bundle = train_bundle(family, tmp_path, cuts=CUTS)
    graph = CoreGraph(core_graph(bundle, tmp_path, LIMITS.slots, "bf16"), print, 1, "bf16")
    spec = TierFolder.open(bundle, "cloud").manifest.serving.spec
    counted = session_bytes(spec, range(4), LIMITS.slots, "bf16")
    assert counted == sum(cache.nbytes for cache in graph.caches.values())


# --- What must be there


def test_without_tensorrt_it_is_said_what_to_install(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_lean", "tensorrt_lean_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'tensorrt>=10\.15' cuda-bindings"):
        TensorRtEngine.load(TierFolder.open(bundle, "cloud"))


def test_a_tensorrt_whose_parser_does_not_know_the_operators_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = ModuleType("tensorrt")
    monkeypatch.setattr(old, "__version__", "10.14.1.48", raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(ConfigError, match=r"10\.14\.1\.48 is too old"):
        check_builder()


def test_type_stubs_are_not_taken_for_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    with pytest.raises(ConfigError, match="only the type stubs"):
        check_builder()


def test_without_cuda_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(ConfigError, match="needs cuda-bindings"):
        Device()


def test_without_a_gpu_that_is_said() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    if runtime.cudaGetDeviceCount()[1]:
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
        Device()


def test_a_bundle_without_float_weights_is_refused(attending_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="split --train"):
        check_floats(TierFolder.open(attending_bundle, "cloud"))


def test_altered_float_weights_are_refused(tmp_path: Path) -> None:
    _, bundle = train_bundle("llama", tmp_path)
    path = bundle / "cloud" / FLOATS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedFile, match=FLOATS), float_source(TierFolder.open(bundle, "cloud")):
        pass


USED = re.compile(r"\b(engine|self\._context|self\._runtime|library)\.(\w+)")
HOLDERS = {
    "engine": "ICudaEngine",
    "self._context": "IExecutionContext",
    "self._runtime": "Runtime",
    "library": "",
}


def test_the_lean_runtime_has_all_that_running_an_engine_calls() -> None:
    if not find_spec("tensorrt_lean_bindings"):
        pytest.skip("tensorrt-lean-cu13-bindings and -libs are not installed")
    used = {
        ".".join(filter(None, ("tensorrt", HOLDERS[holder], name)))
        for module in (batch, runner)
        for holder, name in USED.findall(inspect.getsource(module))
    }
    assert len(used) > 10
    # In another process: without a driver the library may take the process with it when it ends.
    asked = "import os, tensorrt_lean_bindings as tensorrt\n" + "\n".join(sorted(used)) + "\nos._exit(0)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
