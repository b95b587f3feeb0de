"""Every operator of the graphs that TensorRT is given is one that its parser supports, used as it says."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.cloud.parities import FEATURES
from tests.cloud.tensorrt_graphs import CASES, CUTS, core_graph, typed
from tests.shared.sites import train_bundle
from trifold.cloud.core.engines.tensorrt.build import hinted
from trifold.cloud.core.engines.tensorrt.library import FIRST
from trifold.cloud.core.engines.tensorrt.precision import COMPUTED, Precision

PUBLISHED: Final = Path(__file__).with_name("tensorrt_operators.toml")
SUPPORT: Final[dict[str, Any]] = tomllib.loads(PUBLISHED.read_text())


class Typed:
    """A graph whose values all have a type."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = typed(model).graph
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.inputs = {value.name for value in self.graph.input}
        self.outputs = {value.name for value in self.graph.output}
        values = [*self.graph.input, *self.graph.value_info, *self.graph.output]
        self._types = {value.name: value.type.tensor_type for value in values}

    def type(self, name: str) -> str:
        number = self.constants[name].data_type if name in self.constants else self._types[name].elem_type
        return onnx.TensorProto.DataType.Name(number)

    def rank(self, name: str) -> int:
        return len(self._types[name].shape.dim)

    def sizes(self, name: str) -> list[int]:
        """0 for what is not fixed."""
        return [dimension.dim_value for dimension in self._types[name].shape.dim]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}


def attention(node: onnx.NodeProto, graph: Typed) -> bool:
    """Four inputs of four axes, one output, no soft cap; no scale, with which the parser would multiply whole
    caches; and values as wide as keys, as TensorRT itself asks."""
    _, key, value, _ = node.input
    shapes = all(graph.rank(name) == 4 for name in node.input)
    return (
        shapes
        and len(node.output) == 1
        and attributes(node) == {"scale": 1.0}
        and graph.sizes(key) == graph.sizes(value)
    )


def scatter(node: onnx.NodeProto, graph: Typed) -> bool:
    """Of four axes and along the last but one; what it makes of that, KVCacheUpdate, takes an input of the
    network with a fixed number of slots to an output of it."""
    past, update, _ = node.input
    cache = past in graph.inputs and node.output[0] in graph.outputs and graph.sizes(past)[2] > 0
    return cache and graph.rank(past) == graph.rank(update) == 4 and attributes(node) == {"axis": -2}


def zero_point_is_zero(node: onnx.NodeProto, graph: Typed) -> bool:
    return not numpy_helper.to_array(graph.constants[node.input[2]]).astype(np.float32).any()


def second_is_constant(node: onnx.NodeProto, graph: Typed) -> bool:
    return node.input[1] in graph.constants


def positions_are_int64(node: onnx.NodeProto, graph: Typed) -> bool:
    return graph.type(node.input[3]) == "INT64"


def top_k(node: onnx.NodeProto, graph: Typed) -> bool:
    count = int(numpy_helper.to_array(graph.constants[node.input[1]])[0])
    return count < 3840 and attributes(node).get("sorted", 1) == 1


RULES: Final[dict[str, Callable[[onnx.NodeProto, Typed], bool]]] = {
    "attention": attention,
    "scatter": scatter,
    "zero_point_is_zero": zero_point_is_zero,
    "constant_axes": second_is_constant,
    "constant_depth": second_is_constant,
    "positions_are_int64": positions_are_int64,
    "top_k": top_k,
}


def computed_in(node: onnx.NodeProto, graph: Typed) -> list[str]:
    """The types that the list must have: those of the values, not of indices and shapes."""
    if node.op_type == "OneHot":
        return [graph.type(node.input[2])]
    if node.op_type == "Cast":
        return [graph.type(node.input[0]), graph.type(node.output[0])]
    return [graph.type(node.input[0])]


def faults(model: onnx.ModelProto) -> list[str]:
    """What TensorRT's parser would not take of a graph."""
    graph = Typed(model)
    found = []
    for node in graph.graph.node:
        listed = SUPPORT["operators"].get(node.op_type)
        if listed is None or node.domain:
            found.append(f"{node.domain} {node.op_type} is not supported")
            continue
        found += [
            f"{node.op_type} does not compute in {kind}"
            for kind in computed_in(node, graph)
            if kind not in listed["types"]
        ]
        found += [
            f"{node.op_type} {node.output[0]} breaks the rule {rule}"
            for rule in listed.get("rules", [])
            if not RULES[rule](node, graph)
        ]
    return found


@pytest.mark.parametrize(("family", "name"), CASES)
def test_every_operator_is_supported_in_the_way_and_type_it_is_used(
    family: str, name: str, tmp_path: Path
) -> None:
    _, bundle = train_bundle(family, tmp_path, cuts=CUTS, **FEATURES[family][name])
    for precision in COMPUTED:
        work = tmp_path / precision
        work.mkdir()
        model = core_graph(bundle, work, 64, precision)
        least, most = SUPPORT["opsets"]
        assert [(each.domain, least <= each.version <= most) for each in model.opset_import] == [("", True)]
        assert not faults(model)


def test_the_list_is_that_of_the_first_version_which_can_build_the_graph() -> None:
    assert f"TensorRT {FIRST} " in PUBLISHED.read_text().splitlines()[0]


def edited(model: onnx.ModelProto, kind: str, **changes: Any) -> onnx.ModelProto:
    """The graph with attributes of its first operator of a kind set otherwise."""
    node = next(node for node in model.graph.node if node.op_type == kind)
    kept = [one for one in node.attribute if one.name not in changes]
    del node.attribute[:]
    node.attribute.extend([*kept, *(onnx.helper.make_attribute(*change) for change in changes.items())])
    return model


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("TensorScatter", {"axis": 2}), ("Attention", {"softcap": 30.0}), ("TopK", {"sorted": 0})],
)
def test_an_operator_used_in_another_way_is_found(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    _, bundle = train_bundle("qwen3_moe", tmp_path, cuts=CUTS)
    model = core_graph(bundle, tmp_path, 64)
    assert not faults(model)
    assert any(kind in fault for fault in faults(edited(model, kind, **changes)))


def test_what_tensorrt_gets_beyond_the_standard_is_leave_to_split_attention(tmp_path: Path) -> None:
    _, bundle = train_bundle("deepseek_v3", tmp_path, cuts=CUTS)
    model = core_graph(bundle, tmp_path, 64)
    given = onnx.ModelProto.FromString(hinted(model.SerializeToString()))
    attentions = [node for node in given.graph.node if node.op_type == "Attention"]
    assert len(attentions) == 4
    for node in attentions:
        assert node.attribute.pop() == onnx.helper.make_attribute("TRT_decomposable", 1)
    assert given == model


def kinds(bundle: Path, work: Path, precision: Precision) -> Sequence[str]:
    return [node.op_type for node in core_graph(bundle, work, 64, precision).graph.node]


def test_fp8_is_where_a_norm_bounds_what_is_multiplied_and_nowhere_else(tmp_path: Path) -> None:
    _, bundle = train_bundle("deepseek_v2", tmp_path, cuts=CUTS)
    found = {}
    for precision in ("bf16", "fp8"):
        (tmp_path / precision).mkdir()
        found[precision] = kinds(bundle, tmp_path / precision, precision)
    assert found["bf16"].count("QuantizeLinear") == 0
    # Of a layer: queries and keys, queries from their latent, gate and up, those of the shared experts.
    assert found["fp8"].count("QuantizeLinear") == 3 + 4 * 3
    assert found["fp8"].count("Gemm") == found["bf16"].count("Gemm")
