"""Writes the graph that `trifold doctor` runs on each execution provider: softmax(left · right), in fp32."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import onnx_ir.tape

TARGET = Path(__file__).parent / "trifold/edge/doctor/probe.onnx"

OPSET = 17
"""Old enough for every provider that there is."""


def graph() -> bytes:
    """The model, in ONNX's own format."""
    left, right = (_input(name, shape) for name, shape in (("left", (8, 32)), ("right", (32, 8))))
    tape = onnx_ir.tape.Tape()
    out = tape.op("Softmax", [tape.op("MatMul", [left, right])], attributes={"axis": -1})
    out.name, out.dtype, out.shape = "out", ir.DataType.FLOAT, ir.Shape((8, 8))
    nodes = ir.Graph([left, right], [out], nodes=tape.nodes, opset_imports={"": OPSET}, name="probe")
    return ir.to_proto(ir.Model(nodes, ir_version=8)).SerializeToString(deterministic=True)


def _input(name: str, shape: tuple[int, int]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


if __name__ == "__main__":
    TARGET.write_bytes(graph())
