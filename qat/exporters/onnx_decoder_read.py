"""A decoder's ONNX file back into codes, stored scales and floats: quantized weights by the nodes that use them."""

from typing import Any

import onnx
import torch
from onnx import NodeProto, helper, numpy_helper

from qat.affine import QTensor
from qat.errors import VerifyError
from qat.exporters.onnx_nbits import decode
from qat.exporters.onnx_read import stored
from qat.frozen import Frozen, FrozenInput, FrozenWeight
from qat.scheme import QuantSpec

WHERE = {"MatMulNBits": 1, "GatherBlockQuantized": 0}  # the input that holds codes; scales and zero points are 2 and 3


def read_decoder(model: onnx.ModelProto, told: dict[str, Any]) -> Frozen:
    """Every parameter under its Hugging Face name; told: what the metadata says. Raises VerifyError naming what is not
    as written, and KeyError, ValueError, IndexError or RuntimeError for a file that this export never writes."""
    constants = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    views = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Reshape"}
    out = Frozen({}, {}, config=told["config"], ties=told["ties"])
    used: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.op_type not in WHERE:
            continue
        name = out.ties.get(f"{node.name}.weight", f"{node.name}.weight")
        codes = node.input[WHERE[node.op_type]]
        sources = [views.get(codes, codes), *node.input[2:4]]
        if used.setdefault(name, sources)[:2] != sources[:2]:
            raise VerifyError(f"{node.name}: it is tied to {name} but has codes or scales of its own")
        used[name] = max(used[name], sources, key=len)
        spec, kind = QuantSpec.from_dict(told["weights"][name]["spec"]), told["weights"][name]["kind"]
        out.weights[name] = _weight(node, [constants[s] for s in sources], spec, kind, name)
        if node.op_type == "MatMulNBits" and (given := _input(node, told["inputs"])) is not None:
            out.inputs[node.name] = given
    parts = {part for sources in used.values() for part in sources}
    out.floats = {n: t for n, t in constants.items() if not n.startswith("/") and n not in parts}
    return out


def _weight(node: NodeProto, parts: list[torch.Tensor], spec: QuantSpec, kind: str, name: str) -> FrozenWeight:
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    data, scale, *zero = parts
    rows, blocks = scale.shape
    cols = blocks * given["block_size"]
    if (given["bits"], given.get("N", rows), given.get("K", cols)) != (spec.type.bits, rows, cols):
        raise VerifyError(f"{name}: the bits or sizes of {node.op_type} are not those of its {spec.label()} codes")
    codes, scale, offset = decode(data, scale, zero[0] if zero else None, spec)
    tensor = QTensor(codes, stored(scale, spec, name), offset, spec)
    return FrozenWeight(tensor, kind, (cols, rows) if kind == "Conv1D" else (rows, cols))


def _input(node: NodeProto, inputs: dict[str, Any]) -> FrozenInput | None:
    level = next((a.i for a in node.attribute if a.name == "accuracy_level"), 0)
    if level != (4 if node.name in inputs else 0):
        raise VerifyError(f"{node.name}: accuracy level {level} does not compute as it was trained")
    return FrozenInput(QuantSpec.from_dict(inputs[node.name]), False) if level else None
