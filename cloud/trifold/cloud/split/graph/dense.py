"""SwiGLU: the feed-forward part of a dense layer, and the shared expert of a MoE layer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trifold.cloud.split.graph.builder import MICROSOFT, Builder
from trifold.cloud.split.graph.matrix import stack, whole
from trifold.shared.model.names import DenseNames


def swiglu(builder: Builder, x: ir.Value, names: DenseNames) -> ir.Value:
    """down(silu(gate(x)) · up(x)) of rows x, before the residual."""
    source = builder.source
    gate, up = whole(source, names.gate), whole(source, names.up)
    bias = None
    if names.gate_bias and names.up_bias:
        both = [source.vector(name) for name in (names.gate_bias, names.up_bias)]
        bias = builder.tensor(np.concatenate(both))
    gated, raised = builder.split(builder.linear(x, stack([gate, up]), bias), gate.outputs, up.outputs)
    # With alpha 1, x · sigmoid(alpha · x) is SiLU.
    inner = builder.op("Mul", builder.op("QuickGelu", gated, domain=MICROSOFT, alpha=1.0), raised)
    down_bias = builder.vector(names.down_bias) if names.down_bias else None
    return builder.linear(inner, whole(source, names.down), down_bias)
