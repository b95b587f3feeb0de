"""Machine: what it reaches in practice, for shares of that."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final

import trifold.shared.runtime.untold  # noqa: F401  # isort: skip - before onnxruntime

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from trifold.cloud.split.graph.builder import IR_VERSION, MICROSOFT, OPSETS
from trifold.cloud.split.graph.quantize import BLOCK, Bits, quantize
from trifold.shared.runtime.engine import load

_TRIES: Final = 20
_BYTES: Final = 2**30
_SIDE: Final = 2048
_ROWS: Final = 512


@dataclass(frozen=True)
class Machine:
    """Bytes read from memory and operations in matrix products, a second."""

    read_rate: float
    matrix_rate: float

    def best(self, other: Machine) -> Machine:
        """Of two measurements: others use the machine, too, and slow down one or both."""
        return Machine(max(self.read_rate, other.read_rate), max(self.matrix_rate, other.matrix_rate))


def read_rate(threads: int) -> float:
    """Bytes a second that so many threads read from memory at most, of a gigabyte in all."""
    arrays = np.split(np.ones(_BYTES // 4 // threads * threads, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        # Of all that NumPy does with a number, this takes least: a sum cannot keep up with the memory.
        seconds = _fastest(lambda: list(pool.map(np.dot, arrays, arrays)))
    return sum(array.nbytes for array in arrays) / seconds


def matrix_rate(threads: int, bits: Bits | None) -> float:
    """Operations a second of the operator that the core multiplies matrices by, in that quantization."""
    weight = np.random.default_rng(0).standard_normal((_SIDE, _SIDE), np.float32)
    if bits is None:
        weights: dict[str, NDArray[Any]] = {"weight": weight}
        node = helper.make_node("FusedMatMul", ["rows", "weight"], ["out"], domain=MICROSOFT, transB=1)
    else:
        codes, scales = quantize(weight, bits)
        weights = {"codes": codes, "scales": scales}
        node = helper.make_node(
            "MatMulNBits",
            ["rows", "codes", "scales"],
            ["out"],
            domain=MICROSOFT,
            K=_SIDE,
            N=_SIDE,
            bits=bits,
            block_size=BLOCK,
            accuracy_level=4,
        )
    given, got = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("rows", "out")
    )
    graph = helper.make_graph(
        [node],
        "product",
        [given],
        [got],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid(domain, number) for domain, number in OPSETS.items()]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    session = load(model.SerializeToString(), b"", threads=threads)
    rows = np.random.default_rng(1).standard_normal((_ROWS, _SIDE), np.float32)
    return 2 * _ROWS * _SIDE**2 / _fastest(lambda: session.run(None, {"rows": rows}))


def _fastest(work: Callable[[], object]) -> float:
    """Seconds; the first try warms up."""
    times = []
    for _ in range(1 + _TRIES):
        began = perf_counter()
        work()
        times.append(perf_counter() - began)
    return min(times[1:])
