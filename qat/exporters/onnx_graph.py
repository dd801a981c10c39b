"""Nodes and initializers of the ONNX export. A node that stands for a layer carries the layer's path as its name."""

import json
from typing import Any

import onnx
from onnx import TensorProto, helper
from torch import Tensor

from qat.bias import bias_codes, bias_scale, bias_values
from qat.errors import UserError
from qat.exporters.onnx_graph_base import GraphBase
from qat.frozen import FrozenInput

Layer = dict[str, Any]
COMMUTING = ("ReLU", "MaxPool2d", "Flatten")
METADATA = "qat"


class Graph(GraphBase):
    """Grows from the input "x" to the output "logits"; every method returns the name of the tensor it made."""

    def quantize(self, x: str, coming: tuple[str, FrozenInput] | None) -> str:
        """x on the grid of the layer that will use it (name, input), or x itself if there is none."""
        if coming is None:
            return x
        return self.fixed_grid(x, *coming, at=x)

    def layer(self, layer: Layer, x: str) -> str:
        name = layer["name"]
        kind = layer["kind"]
        if kind == "Conv2d":
            return self.add("Conv", [x, *self.parameters(name)], name, group=layer["groups"], **_window(layer))
        if kind == "Linear":
            return self.add("Gemm", [x, *self.parameters(name)], name, transB=1)
        if kind == "MaxPool2d":
            return self.add("MaxPool", [x], name, ceil_mode=int(layer["ceil_mode"]), **_window(layer))
        if kind == "ReLU":
            return self.add("Relu", [x], name)
        if kind == "Flatten":
            return self.add("Flatten", [x], name, axis=1)
        raise UserError(f"export to onnx: {name} is a {kind}, which has no ONNX form here; leave it out or add it")

    def parameters(self, layer: str) -> list[str]:
        """Weight and bias (if there is one), each an initializer behind DequantizeLinear where it is quantized."""
        name, bias = f"{layer}.weight", self.frozen.floats.get(f"{layer}.bias")
        held = self.frozen.weights.get(name)
        if held is None:
            floats = {name: self.frozen.floats[name]} | ({} if bias is None else {f"{layer}.bias": bias})
            return [self.constant(n, t.float()) for n, t in floats.items()]
        weight = self.dequantized(name, held.tensor.codes.reshape(held.shape), held.tensor.scale.float().flatten())
        if bias is None:
            return [weight]
        given = self.frozen.inputs.get(layer)
        if given is None or given.scale is None:
            return [weight, self.constant(f"{layer}.bias", bias.float())]
        scale = bias_scale(given.scale, held.tensor.scale)
        codes = bias_codes(bias, scale)
        if not bias_values(codes, scale).equal(bias.float()):
            raise UserError(
                f"export to onnx: {layer}.bias is not on its int32 grid (input scale * weight scale); call "
                "qat.quantizers.bias.round_biases(model) before convert"
            )
        return [weight, self.dequantized(f"{layer}.bias", codes, scale)]

    def dequantized(self, name: str, codes: Tensor, scale: Tensor) -> str:
        """Symmetric codes with a float32 scale [1], or one for each entry of axis 0."""
        codes_name = self.constant(name, codes)
        scale = scale.reshape(()) if len(scale) == 1 else scale
        scale_name = self.constant(f"{name}.scale", scale)
        zero = self.constant(f"{name}.zero_point", codes.new_zeros(scale.shape))
        return self.add("DequantizeLinear", [codes_name, scale_name, zero], name, axis=0)

    def model(self, output: str, opset: int, ir_version: int) -> onnx.ModelProto:
        """The finished model, shapes inferred; specs and config, which no tensor tells, are in its metadata."""
        self.nodes.append(helper.make_node("Identity", [output], ["logits"]))
        shape = ["N", *self.frozen.config["input_shape"]]
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)]
        graph = helper.make_graph(
            self.nodes, self.frozen.config["architecture"], inputs, outputs, [*self.constants.values()]
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version, producer_name="qat"
        )
        told = {
            "config": self.frozen.config,
            "weights": {n: w.tensor.spec.to_dict() for n, w in self.frozen.weights.items()},
            "inputs": {n: i.spec.to_dict() for n, i in self.frozen.inputs.items()},
        }
        helper.set_model_props(model, {METADATA: json.dumps(told)})
        return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def _window(layer: Layer) -> dict[str, Any]:
    sizes = {"kernel_shape": layer["kernel_size"], "strides": layer["stride"], "dilations": layer["dilation"]}
    return {**sizes, "pads": layer["padding"] * 2}
