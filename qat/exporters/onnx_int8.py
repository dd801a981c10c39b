"""Int8 linear layers as ONNX: one weight scale a row, inputs quantized statically or for each token, integer products.

Static: QuantizeLinear and DequantizeLinear around MatMul, which ONNX Runtime makes one MatMulIntegerToFloat. For each
token: max|x| / 127 in plain operators, then MatMulInteger; so a token's numbers depend on no other token.
Codes are int8 [N, K] with a float32 scale [N] (or one for all), whether a table to look up or a matrix.
"""

import numpy as np
from onnx import TensorProto

from qat.errors import UserError
from qat.exporters.onnx_graph_base import GraphBase
from qat.frozen import FrozenInput, FrozenWeight
from qat.scheme import QuantSpec, Scheme

TOKEN = QuantSpec(qtype="int8", block=(1, -1), scale="float32")
TENSOR = QuantSpec(qtype="uint8", block=(-1, -1), range="minmax", scale="float32", offset="zero_point")
FLOAT_INPUT = (
    "ONNX Runtime rounds the input of such weights if it is in floating point; use block (1, 32) for the weight, or "
    "quantize the input as well (scheme=int8_static or int8_token)"
)
TINY = float(np.finfo(np.float32).tiny)  # the least scale, as in affine.store_scale


def is_row_wise(spec: QuantSpec) -> bool:
    """Whether the grid is one of those that are written here."""
    return spec.block in ((1, -1), (-1, -1)) and spec.qtype == "int8" and spec.offset is None


def refuse_static(spec: QuantSpec) -> str | None:
    """Why QuantizeLinear does not compute a static input grid; None if it does."""
    if spec.type.bits != 8 or spec.offset not in (None, "zero_point"):
        return f"QuantizeLinear takes int8 or uint8 with a zero point or none, not {spec.label()}"
    if spec.rounding != "half_even" or spec.divide != "stored":
        return "QuantizeLinear divides by the stored scale and rounds half to even; set that in the input's spec"
    return None


def refuse_input(scheme: Scheme) -> str | None:
    """Why a linear layer with such a weight does not compute with its input; None if it does."""
    if scheme.input is None:
        return FLOAT_INPUT
    if scheme.static:
        return refuse_static(scheme.input)
    if scheme.input != TOKEN:
        said = "qtype: int8, block: [1, -1], range: absmax, divide: stored, scale: float32"
        return f"inputs that are quantized dynamically are so for each token, {{{said}}}; or use static: true"
    return None


def weight(graph: GraphBase, name: str, held: FrozenWeight) -> tuple[str, str]:
    """The initializers of codes [N, K] and scales [N] or []."""
    scale = held.tensor.scale.float()
    flat = scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1)
    return graph.stored(name, held.tensor.codes), graph.stored(f"{name}.scale", flat)


def embedding(graph: GraphBase, module: str, ids: str, name: str, held: FrozenWeight) -> str:
    """The rows that are looked up, dequantized."""
    codes, scale = weight(graph, name, held)
    found = graph.add("Cast", [graph.add("Gather", [codes, ids], module)], f"{module}/float", to=TensorProto.FLOAT)
    if held.tensor.scale.numel() > 1:
        scale = graph.add("Gather", [scale, ids], f"{module}/scale")
        scale = graph.add("Unsqueeze", [scale, graph.ints(-1)], f"{module}/column")
    return graph.add("Mul", [found, scale], f"{module}/dequantize")


def linear(graph: GraphBase, module: str, x: str, name: str, held: FrozenWeight, given: FrozenInput | None) -> str:
    """x [..., K] -> [..., N], without the bias. Raises UserError for a layer whose input is in floating point."""
    if given is None:
        raise UserError(f"export to onnx: {module}: {FLOAT_INPUT}")
    codes, scale = weight(graph, name, held)
    codes = graph.add("Transpose", [codes], f"{module}/transpose", perm=[1, 0])  # done once, when the file is loaded
    if not given.static:
        return _for_each_token(graph, module, x, codes, scale)
    # without a zero point, or with one for all layers, ONNX Runtime's optimizer breaks the transposed matrix
    zeros = np.zeros(held.tensor.scale.numel() if held.tensor.scale.numel() > 1 else (), np.int8)
    zero = graph.constant(f"/zeros/{module}", zeros)
    matrix = graph.add("DequantizeLinear", [codes, scale, zero], f"{module}/weight", axis=1)
    return graph.add("MatMul", [graph.fixed_grid(x, module, given, module), matrix], module)


def _for_each_token(graph: GraphBase, module: str, x: str, codes: str, scale: str) -> str:
    largest = graph.add("ReduceMax", [graph.add("Abs", [x], f"{module}/abs"), graph.ints(-1)], f"{module}/largest")
    step = graph.add("Div", [largest, graph.number(127.0)], f"{module}/step")
    step = graph.add("Max", [step, graph.number(TINY)], f"{module}/normal")
    rounded = graph.add("Round", [graph.add("Div", [x, step], f"{module}/divided")], f"{module}/rounded")
    # uint8 codes with 128 for 0 are the same integers, for which x86 has an instruction
    moved = graph.add("Add", [rounded, graph.number(128.0)], f"{module}/moved")
    q = graph.add("Cast", [moved], f"{module}/codes", to=TensorProto.UINT8)
    sums = graph.add("MatMulInteger", [q, codes, graph.constant("/128", np.array(128, np.uint8))], module)
    sums = graph.add("Cast", [sums], f"{module}/float", to=TensorProto.FLOAT)
    return graph.add("Mul", [graph.add("Mul", [sums, step], f"{module}/tokens"), scale], f"{module}/channels")
