"""Sequential convolutional networks as ONNX: static int8 in QuantizeLinear/DequantizeLinear form.

The graph is built from `Frozen` alone (`config` as `qat.models.sequential.describe` gives it). A layer's input is
quantized as soon as it exists: ReLU, MaxPool and Flatten commute with rounding to a grid that holds 0.0, so moving
them behind it changes no code, and ONNX Runtime then runs QLinearConv, QGemm and integer pooling, whose numbers are
those of the fake-quantized model. Biases are int32 at input scale * weight scale.
"""

from pathlib import Path
from typing import Any

import onnx

from qat.exporters.onnx_graph import COMMUTING, Graph, Layer
from qat.exporters.onnx_int8 import refuse_static
from qat.frozen import Frozen, FrozenInput
from qat.scheme import QuantSpec, Scheme

OPSET, IR_VERSION = 17, 8  # old enough for every runtime of the last years
REMEDY = "use int8, block (1, -1), no offset (scheme=int8_static)"


def refuse_parameter(
    name: str, kind: str, shape: tuple[int, ...], spec: QuantSpec | None, config: dict[str, Any]
) -> str | None:
    """Why this target cannot hold the parameter, and what to do; None if it can."""
    if name.rpartition(".")[0] not in {layer["name"] for layer in config["layers"]}:
        return "its layer is not in config['layers']: describe the model that is converted"
    if spec is None:
        return None
    if kind not in ("Conv2d", "Linear"):
        return f"{kind} has no quantized form here; leave it in floating point"
    if spec.qtype != "int8" or spec.offset is not None or spec.block not in ((1, -1), (-1, -1)):
        return f"integer kernels take int8 weights with one symmetric scale a channel, not {spec.label()}; {REMEDY}"
    return None


def export(frozen: Frozen, path: Path) -> None:
    """Write `path`. Raises UserError as `header` does."""
    model = header(frozen)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def header(frozen: Frozen) -> onnx.ModelProto:
    """The whole model: weights are few here. Input "x": float32 [N, *config["input_shape"]]; output "logits".

    Raises UserError for a layer without ONNX form or a bias that is not on its int32 grid, and KeyError for what
    `frozen` lacks.
    """
    layers: list[Layer] = frozen.config["layers"]
    graph = Graph(frozen)
    x = graph.quantize("x", _coming(frozen, layers))
    for i, layer in enumerate(layers):
        coming = _coming(frozen, layers[i + 1 :])
        x = graph.layer(layer, x)
        fused = layer["kind"] not in COMMUTING and i + 1 < len(layers) and layers[i + 1]["kind"] == "ReLU"
        if not (fused and _relu_is_clipping(coming)):
            x = graph.quantize(x, coming)
    return graph.model(x, OPSET, IR_VERSION)


def _coming(frozen: Frozen, layers: list[Layer]) -> tuple[str, FrozenInput] | None:
    """The next layer that multiplies and its input grid, if it has one: what is before it commutes with rounding."""
    for layer in layers:
        if layer["kind"] not in COMMUTING:
            given = frozen.inputs.get(layer["name"])
            return None if given is None else (layer["name"], given)
    return None


def _relu_is_clipping(coming: tuple[str, FrozenInput] | None) -> bool:
    """0.0 is the lowest code, so quantizing clips negative values: ONNX Runtime drops a ReLU before it."""
    if coming is None or coming[1].offset is None:
        return False
    return int(coming[1].offset) == coming[1].spec.type.qmin


def refuse_scheme(scheme: Scheme, config: dict[str, Any]) -> str | None:
    """Why a layer's input cannot be on this grid, and what to do; None if it can."""
    spec = scheme.input
    if spec is None:
        return None
    if not scheme.static:
        return "it is quantized dynamically; use static: true (scheme=int8_static)"
    return refuse_static(spec)
