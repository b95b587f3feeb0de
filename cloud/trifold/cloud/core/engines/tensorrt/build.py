"""Building an engine: float weights -> graph -> TensorRT's plan. Minutes, once for each key (Key)."""

from __future__ import annotations

import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final

import onnx

from trifold.cloud.core.engines.tensorrt import graph
from trifold.cloud.core.engines.tensorrt.batch import sizes_of
from trifold.cloud.core.engines.tensorrt.floats import float_source
from trifold.cloud.core.engines.tensorrt.library import check_builder, logger
from trifold.cloud.core.engines.tensorrt.plans import Key, Plans
from trifold.cloud.core.engines.tensorrt.profiles import Limits, profiles
from trifold.cloud.core.engines.tensorrt.typed_weights import TypedWeights
from trifold.cloud.split.graph.weights import WEIGHTS
from trifold.shared.bundle.folder import Progress, TierFolder
from trifold.shared.errors import TrifoldError

if TYPE_CHECKING:
    import tensorrt as trt

_MODEL: Final = "core.onnx"


def build(
    folder: TierFolder,
    key: Key,
    plans: Plans,
    *,
    portable: bool,
    progress: Progress = lambda done, total: None,
) -> bytes:
    """The plan of a core, for this machine's GPU; the timings of its kernels are kept for the next one.

    `portable` makes it version-compatible: kernels of the lean runtime alone, for this version of TensorRT
    and later ones. `progress` hears of the weights checked.

    Raises ConfigError without TensorRT or float weights, TrifoldError with TensorRT's words where it refuses.
    """
    check_builder()
    import tensorrt as trt

    # Among the plans, where there is room: it holds the weights once more while the engine is built.
    with tempfile.TemporaryDirectory(prefix=".build.", dir=plans.folder) as work:
        model = _write(folder, key, Path(work), progress)
        log = logger(trt)
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(model)):
            errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
            raise TrifoldError(
                f"TensorRT {trt.__version__} cannot read the core's graph: {'; '.join(errors)}"
            )
        config = builder.create_builder_config()
        # TF32 would round what is fp32 on purpose: the router.
        config.clear_flag(trt.BuilderFlag.TF32)
        if portable:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        timings = config.create_timing_cache(plans.read(key.timings))
        config.set_timing_cache(timings, ignore_mismatch=False)
        _add_profiles(builder, config, network, key.limits)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise TrifoldError(f"TensorRT {trt.__version__} cannot build the core: its log says why")
        plans.keep(key.timings, bytes(config.get_timing_cache().serialize()))
        return bytes(plan)


def _write(folder: TierFolder, key: Key, work: Path, progress: Progress) -> Path:
    """model and weights in `work`, where the parser looks for the one beside the other."""
    serving = folder.manifest.serving
    layers = serving.cuts.layers(folder.tier, len(serving.spec.layers))
    with float_source(folder, progress) as source, closing(TypedWeights(work / WEIGHTS)) as weights:
        data = graph.build(source, layers, key.limits.slots, key.precision, weights)
    (work / _MODEL).write_bytes(hinted(data))
    return work / _MODEL


def hinted(data: bytes) -> bytes:
    """The graph with leave to compute attention by several kernels where TensorRT has not one for its shape.

    An attribute of the parser's own, which other readers of ONNX refuse.
    """
    model = onnx.ModelProto.FromString(data)
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.attribute.append(onnx.helper.make_attribute("TRT_decomposable", 1))
    return model.SerializeToString(deterministic=True)


def _add_profiles(
    builder: trt.Builder, config: trt.IBuilderConfig, network: trt.INetworkDefinition, limits: Limits
) -> None:
    """In the order of DECODE and PROMPT."""
    import tensorrt as trt

    for profile in profiles(limits):
        shapes = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            least, typical, most = (trt.Dims([*shape]) for shape in profile.shapes(sizes_of(tensor.shape)))
            shapes.set_shape(tensor.name, least, typical, most)
        config.add_optimization_profile(shapes)
