"""A language model's ONNX file back into codes, scales and floats: quantized weights by the nodes that use them."""

from typing import Any

import onnx
import torch
from onnx import NodeProto, helper, numpy_helper
from torch import Tensor

from qat.affine import QTensor
from qat.errors import VerifyError
from qat.exporters.onnx_nbits import decode
from qat.exporters.onnx_read import stored
from qat.frozen import Frozen, FrozenInput, FrozenWeight
from qat.scheme import QuantSpec
from qat.streams import Later

BLOCKS = {"MatMulNBits": 1, "GatherBlockQuantized": 0}  # the input that holds codes; scales and zero points: 2 and 3


def read_text(model: onnx.ModelProto, told: dict[str, Any]) -> Frozen:
    """Every parameter under its Hugging Face name; told: what the metadata says. Raises VerifyError naming what is not
    as written, and KeyError, ValueError, IndexError or RuntimeError for a file that this export never writes."""
    return _Reader(model, told).frozen()


class _Reader:
    def __init__(self, model: onnx.ModelProto, told: dict[str, Any]) -> None:
        self.told = told
        self.nodes = {n.name: n for n in model.graph.node}
        held = {t.name: t for t in model.graph.initializer}
        self.constants = Later(held, lambda name: torch.from_numpy(numpy_helper.to_array(held[name]).copy()))
        views = [n for n in model.graph.node if n.op_type in ("Reshape", "Transpose")]
        self.views = {n.output[0]: n.input[0] for n in views if n.input[0] in self.constants}

    def frozen(self) -> Frozen:
        weights: dict[str, FrozenWeight] = {}
        inputs: dict[str, FrozenInput] = {}
        ties: dict[str, str] = self.told["ties"]
        used: dict[str, list[str]] = {}
        for node in self.nodes.values():
            sources = self.sources(node)
            if not sources:
                continue
            module = node.name.removesuffix("/weight")
            name = ties.get(f"{module}.weight", f"{module}.weight")
            if used.setdefault(name, sources)[:2] != sources[:2]:
                raise VerifyError(f"{module}: it is tied to {name} but has codes or scales of its own")
            used[name] = max(used[name], sources, key=len)
            weights[name] = self.weight(name, node, [self.constants[s] for s in sources])
            if (
                node.op_type not in ("GatherBlockQuantized", "Gather")
                and (given := self.input(module, node)) is not None
            ):
                inputs[module] = given
        parts = {part for sources in used.values() for part in sources}
        parts |= {f"{module}.input.{part}" for module in inputs for part in ("scale", "zero_point")}
        floats = {n: self.constants[n] for n in self.constants if not n.startswith("/") and n not in parts}
        return Frozen(weights, floats, inputs, ties, self.told["config"])

    def sources(self, node: NodeProto) -> list[str]:
        """The initializers of codes, scales and zero points that a node uses; none if it uses no codes."""
        if node.op_type in BLOCKS:
            codes = node.input[BLOCKS[node.op_type]]
            return [self.views.get(codes, codes), *node.input[2:4]]
        if node.op_type == "DequantizeLinear" and node.name.endswith("/weight"):
            return [self.views[node.input[0]], node.input[1]]
        if node.op_type == "MatMulInteger":
            return [self.views[node.input[1]], self.nodes[f"{node.name}/channels"].input[1]]
        if node.op_type == "Gather" and f"{node.name}/dequantize" in self.nodes:
            scale = self.nodes.get(f"{node.name}/scale")
            return [node.input[0], self.nodes[f"{node.name}/dequantize"].input[1] if scale is None else scale.input[0]]
        return []

    def weight(self, name: str, node: NodeProto, parts: list[Tensor]) -> FrozenWeight:
        written = self.told["weights"][name]
        spec, kind = QuantSpec.from_dict(written["spec"]), written["kind"]
        data, scale, *zero = parts
        if node.op_type in BLOCKS:
            given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            rows, cols = len(scale), scale.shape[1] * given["block_size"]
            if (given["bits"], given.get("N", rows), given.get("K", cols)) != (spec.type.bits, rows, cols):
                raise VerifyError(f"{name}: bits or sizes of {node.op_type} are not those of {spec.label()} codes")
            codes, scale, offset = decode(data, scale, zero[0] if zero else None, spec)
        else:
            codes, scale, offset = data, scale.reshape(-1, 1), None
            if codes.dtype != spec.type.storage:
                raise VerifyError(f"{name}: the codes are {codes.dtype}, not {spec.type.storage}")
        tensor = QTensor(codes, stored(scale, spec), offset, spec)
        shape = (codes.shape[0], codes.shape[1])
        return FrozenWeight(tensor, kind, shape[::-1] if kind == "Conv1D" else shape)

    def input(self, module: str, node: NodeProto) -> FrozenInput | None:
        """How a layer's input is quantized, which its operators show and the metadata must confirm."""
        quantize = self.nodes.get(f"{module}/quantize")
        level = next((a.i for a in node.attribute if a.name == "accuracy_level"), 0)
        found = quantize is not None or level == 4 or node.op_type == "MatMulInteger"
        written = self.told["inputs"].get(module)
        if found != (written is not None) or level not in (0, 4):
            raise VerifyError(f"{module}: {node.op_type} does not compute with its input as it was trained")
        if written is None:
            return None
        spec = QuantSpec.from_dict(written)
        if quantize is None:
            return FrozenInput(spec, False)
        scale, zero = (self.constants[i] for i in quantize.input[1:])
        if zero.dtype != spec.type.storage or (spec.offset is None and zero.any()):
            raise VerifyError(f"{module}: its input's zero point is not of {spec.label()}")
        offset = None if spec.offset is None else zero.to(torch.int32).reshape(1, 1)
        return FrozenInput(spec, True, stored(scale.reshape(1, 1), spec), offset)
