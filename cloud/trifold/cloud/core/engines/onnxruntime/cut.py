"""The graph of a core, cut at its attention.

What lies between two attentions computes each row by itself, so it may be given the rows of many sessions.
Attention is of one session, with its own cache: ONNX Runtime's operator refuses several with more than one
row each, and with one row it gives other bits (trifold.cloud.split.graph.attention).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import onnx
from onnx import helper

_ATTENTION: Final = "GroupQueryAttention"


@dataclass(frozen=True)
class Between:
    """A graph between two attentions, or before the first, or behind the last."""

    model: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Attention:
    """One layer's: it takes the value `qkv` and gives `out` (1, rows, query_heads · size).

    qkv has (query_heads + 2 · key_heads) · size values a row; `scale` is what scores are multiplied by, and
    `inputs` are those of `model`. Layers of equal `model` can share a session.
    """

    model: bytes
    qkv: str
    out: str
    query_heads: int
    key_heads: int
    size: int
    scale: float
    inputs: tuple[str, ...]

    @property
    def caches(self) -> int:
        """Of a layer: keys and values, or what is both."""
        return 2 if "value" in self.inputs else 1


def cut(data: bytes) -> tuple[list[Between], list[Attention]]:
    """The graphs of a model.onnx: one of the former more than of the latter, to be run in turn.

    An Attention's graph has inputs qkv (1, rows, width), key, last_position, position_count and, but for
    latent attention, value, cos and sin; its outputs are out, present_key and present_value.
    """
    model = onnx.ModelProto.FromString(data)
    maker = {name: node for node in model.graph.node for name in node.output}
    attentions: list[Attention] = []
    spans: list[list[onnx.NodeProto]] = [[]]
    for node in model.graph.node:
        if node.op_type == _ATTENTION:
            chosen = maker[node.input[0]]
            shaped = maker[chosen.input[0]]
            spans[-1] = [other for other in spans[-1] if other is not chosen and other is not shaped]
            attentions.append(_attention(model, node, shaped.input[0]))
            spans.append([])
        else:
            spans[-1].append(node)
    wanted = [{*(one.qkv for one in attentions), *(value.name for value in model.graph.output)}] * len(spans)
    later: set[str] = set()
    for number in reversed(range(len(spans))):
        wanted[number] = wanted[number] | later
        later |= _read(spans[number])
    return [_between(model, span, names) for span, names in zip(spans, wanted, strict=True)], attentions


def _between(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], wanted: set[str]) -> Between:
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    made = [name for node in nodes for name in node.output]
    read = _read(nodes)
    inputs = sorted(read - set(made) - weights.keys())
    outputs = [name for name in made if name in wanted]
    known = {value.name: value for value in model.graph.input}
    graph = helper.make_graph(
        nodes,
        model.graph.name,
        [known.get(name) or _value(name) for name in inputs],
        [_value(name) for name in outputs],
        [tensor for name, tensor in weights.items() if name in read],
    )
    return Between(_model(model, graph), tuple(inputs), tuple(outputs))


def _attention(model: onnx.ModelProto, node: onnx.NodeProto, qkv: str) -> Attention:
    alone = onnx.NodeProto()
    alone.CopyFrom(node)
    alone.name = ""
    values = "key" if node.input[3] == node.input[4] else "value"
    names = ("qkv", "", "", "key", values, "last_position", "position_count", "cos", "sin")[: len(node.input)]
    outputs = ("out", "present_key", "present_value")
    alone.input[:], alone.output[:] = names, outputs
    inputs = tuple(dict.fromkeys(name for name in names if name))
    whole = {"last_position", "position_count"}
    past = next(value for value in model.graph.input if value.name == node.input[3])
    _, key_heads, _, size = (dimension.dim_value for dimension in past.type.tensor_type.shape.dim)
    given = {attribute.name: attribute for attribute in node.attribute}
    query_heads, scale = given["num_heads"].i, given["scale"].f
    graph = helper.make_graph(
        [alone],
        "attention",
        [_value(name, onnx.TensorProto.INT32 if name in whole else _FLOAT) for name in inputs],
        [_value(name) for name in outputs],
    )
    return Attention(_model(model, graph), qkv, node.output[0], query_heads, key_heads, size, scale, inputs)


_FLOAT: Final = onnx.TensorProto.FLOAT


def _model(like: onnx.ModelProto, graph: onnx.GraphProto) -> bytes:
    made = helper.make_model(graph, opset_imports=like.opset_import, ir_version=like.ir_version)
    data: bytes = made.SerializeToString(deterministic=True)
    return data


def _value(name: str, dtype: int = _FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, None)


def _read(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    return {name for node in nodes for name in node.input if name}
