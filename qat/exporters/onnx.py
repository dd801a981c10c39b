"""ONNX, for ONNX Runtime: sequential convolutional networks with static int8 in QuantizeLinear/DequantizeLinear form.

The graph is built from `Frozen` alone (`config` as `qat.models.sequential.describe` gives it). A layer's input is
quantized as soon as it exists: ReLU, MaxPool and Flatten commute with rounding to a grid that holds 0.0, so moving
them behind it changes no code, and ONNX Runtime then runs QLinearConv, QGemm and integer pooling, whose numbers are
those of the fake-quantized model. Biases are int32 at input scale * weight scale.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import torch

from qat.errors import UserError
from qat.exporters.onnx_graph import COMMUTING, Graph, Layer
from qat.exporters.onnx_read import read_model
from qat.frozen import Frozen, FrozenInput
from qat.scheme import QuantSpec

RUNTIME = "ort"
FILE = "model.onnx"
OPSET, IR_VERSION = 17, 8  # old enough for every runtime of the last years
REMEDY = "use int8, block (1, -1), no offset (scheme=int8_static)"


def missing_runtime() -> str | None:
    """What to install where ONNX Runtime is not there; None if it is."""
    return None if find_spec("onnxruntime") else "pip install onnxruntime"


def refuse(name: str, kind: str, shape: tuple[int, ...], spec: QuantSpec | None, config: dict[str, Any]) -> str | None:
    """Why this target cannot hold the parameter, and what to do; None if it can."""
    layers: list[Layer] | None = config.get("layers")
    if layers is None:
        return (
            "ONNX export builds sequential networks, described by qat.models.sequential.describe; export language "
            "models to gguf or hf"
        )
    if name.rpartition(".")[0] not in {layer["name"] for layer in layers}:
        return "its layer is not in config['layers']: describe the model that is converted"
    if spec is None:
        return None
    if kind not in ("Conv2d", "Linear"):
        return f"{kind} has no quantized form here; leave it in floating point"
    if spec.qtype != "int8" or spec.offset is not None or spec.block not in ((1, -1), (-1, -1)):
        return f"integer kernels take int8 weights with one symmetric scale a channel, not {spec.label()}; {REMEDY}"
    return None


def stored_dtype(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.dtype:
    """The dtype of an unquantized parameter in the file (biases: int32, as wide)."""
    return torch.float32


def export(frozen: Frozen, path: Path) -> None:
    """Write path/model.onnx. Input "x": float32 [N, *config["input_shape"]]; output "logits".

    Raises UserError for an input grid that QuantizeLinear cannot hold, or a bias that is not on its int32 grid.
    """
    layers: list[Layer] = frozen.config["layers"]
    for name, given in frozen.inputs.items():
        if why := refuse_input(None, given.spec, given.static):
            raise UserError(f"export to onnx: the input of {name}: {why}")
    graph = Graph(frozen)
    x = graph.quantize("x", _coming(frozen, layers))
    for i, layer in enumerate(layers):
        coming = _coming(frozen, layers[i + 1 :])
        x = graph.layer(layer, x)
        fused = layer["kind"] not in COMMUTING and i + 1 < len(layers) and layers[i + 1]["kind"] == "ReLU"
        if not (fused and _relu_is_clipping(coming)):
            x = graph.quantize(x, coming)
    model = graph.model(x, OPSET, IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    (path / FILE).write_bytes(model.SerializeToString(deterministic=True))


def read(path: Path) -> Frozen:
    """The file (or a folder with model.onnx) -> codes, scales, zero points and floats. Raises VerifyError."""
    return read_model(path / FILE if path.is_dir() else path)


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


def refuse_input(weight: QuantSpec | None, spec: QuantSpec, static: bool) -> str | None:
    """Why the input of a layer cannot be on this grid, and what to do; None if it can."""
    if not static:
        return "it is quantized dynamically; use static: true (scheme=int8_static)"
    if spec.type.bits != 8 or spec.offset not in (None, "zero_point"):
        return f"QuantizeLinear takes int8 or uint8 with a zero point or none, not {spec.label()}"
    if spec.rounding != "half_even" or spec.divide != "stored":
        return "QuantizeLinear divides by the stored scale and rounds half to even; set that in the input's spec"
    return None
