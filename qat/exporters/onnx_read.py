"""A sequential network's ONNX file back into codes, scales and floats, following the graph as a runtime does."""

from typing import Any

import onnx
import torch
from onnx import NodeProto, numpy_helper
from torch import Tensor

from qat.affine import QTensor
from qat.bias import bias_values
from qat.errors import VerifyError
from qat.exporters.hf_layout import narrow
from qat.frozen import Frozen, FrozenInput, FrozenWeight
from qat.scheme import QuantSpec, stored_dtype

KINDS = {"Conv": "Conv2d", "Gemm": "Linear"}


def read_sequential(model: onnx.ModelProto, told: dict[str, Any]) -> Frozen:
    """Weights, biases and input grids of every Conv and Gemm; told: what the metadata says. Raises VerifyError naming
    what is not as written, and KeyError, ValueError or IndexError for a file that this export never writes."""
    return _Reader(model, told).frozen()


class _Reader:
    def __init__(self, model: onnx.ModelProto, told: dict[str, Any]) -> None:
        self.told = told
        self.nodes = model.graph.node
        self.makers = {output: node for node in model.graph.node for output in node.output}
        self.constants = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}

    def frozen(self) -> Frozen:
        floats: dict[str, Tensor] = {}
        weights: dict[str, FrozenWeight] = {}
        inputs: dict[str, FrozenInput] = {}
        for node in self.nodes:
            if node.op_type not in KINDS:
                continue
            name = f"{node.name}.weight"
            weight = self.maker(node.input[1])
            if weight is None:
                floats[name] = self.constants[node.input[1]]
            else:
                weights[name] = self.weight(name, weight, KINDS[node.op_type])
            if len(node.input) > 2:
                floats[f"{node.name}.bias"] = self.bias(node)
            if node.name in self.told["inputs"]:
                inputs[node.name] = self.input(node)
        return Frozen(weights, floats, inputs, config=self.told["config"])

    def maker(self, tensor: str) -> NodeProto | None:
        """The DequantizeLinear behind a tensor; None if there is none."""
        node = self.makers.get(tensor)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def weight(self, name: str, node: NodeProto, kind: str) -> FrozenWeight:
        spec = QuantSpec.from_dict(self.told["weights"][name])
        codes, scale = self.symmetric(node, name)
        if codes.dtype != spec.type.storage:
            raise VerifyError(f"{name}: the codes are {codes.dtype}, not {spec.type.storage}")
        scale = stored(scale.reshape(-1, 1), spec)
        return FrozenWeight(QTensor(codes.reshape(len(codes), -1), scale, None, spec), kind, tuple(codes.shape))

    def symmetric(self, node: NodeProto, name: str) -> tuple[Tensor, Tensor]:
        codes, scale, zero = (self.constants[i] for i in node.input)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        if zero.any() or (scale.dim() == 1 and (axis != 0 or len(scale) != len(codes))):
            raise VerifyError(f"{name}: its DequantizeLinear has a zero point, or its scales are not one for each row")
        return codes, scale

    def bias(self, node: NodeProto) -> Tensor:
        made = self.maker(node.input[2])
        if made is None:
            return self.constants[node.input[2]]
        return bias_values(*self.symmetric(made, f"{node.name}.bias"))

    def input(self, node: NodeProto) -> FrozenInput:
        spec = QuantSpec.from_dict(self.told["inputs"][node.name])
        dequantize = self.maker(node.input[0])
        quantize = None if dequantize is None else self.makers.get(dequantize.input[0])
        if dequantize is None or quantize is None or quantize.input[1:] != dequantize.input[1:]:
            raise VerifyError(f"{node.name}: its input does not pass through one QuantizeLinear and its inverse")
        scale, zero = (self.constants[i] for i in dequantize.input[1:])
        if zero.dtype != spec.type.storage or (spec.offset is None and zero.any()):
            raise VerifyError(f"{node.name}: its input's zero point is not of {spec.label()}")
        offset = None if spec.offset is None else zero.to(torch.int32).reshape(1, 1)
        return FrozenInput(spec, True, stored(scale.reshape(1, 1), spec), offset)


def stored(scale: Tensor, spec: QuantSpec) -> Tensor:
    """float32 scales of the file in the dtype in which they were frozen; as they are, for `verify` to name, if that
    is not exact."""
    return narrow(scale, stored_dtype(spec.scale))
