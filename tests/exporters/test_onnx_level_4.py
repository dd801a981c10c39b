"""Which integers ONNX Runtime's MatMulNBits makes of its input at accuracy level 4: read off an identity matrix."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qat.affine import choose_qparams, quantize
from qat.exporters.onnx_nbits import encode, level_4
from qat.scheme import QuantSpec

ort = pytest.importorskip("onnxruntime")
SIZE = 256


def codes_of(x: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """x (T, SIZE) times an identity of code 1 and scale 1, over the input's scale: the codes, but for sums in float."""
    grid = QuantSpec(qtype=f"int{bits}", block=(1, block))
    q = quantize(torch.eye(SIZE), choose_qparams(torch.ones(SIZE, SIZE), grid), grid)
    data, scales, _ = encode(replace(q, codes=torch.eye(SIZE, dtype=torch.int8)))
    tensors = [numpy_helper.from_array(t.numpy(), n) for n, t in (("B", data), ("S", torch.ones_like(scales)))]
    shape: dict[str, Any] = {"K": SIZE, "N": SIZE, "bits": bits, "block_size": block, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["A", "B", "S"], ["Y"], domain="com.microsoft", **shape)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["T", SIZE]) for n in "AY"]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], tensors), opset_imports=opsets)
    model.ir_version = 10
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y = torch.from_numpy(np.asarray(session.run(None, {"A": x.numpy()})[0])).unflatten(1, (-1, block))
    scale = x.unflatten(1, (-1, block)).abs().amax(-1, keepdim=True) / 127
    return (y / scale).round().flatten(1)


@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (4, 128), (8, 32), (8, 256), (2, 32)])
def test_codes_are_those_that_training_simulates(bits: int, block: int) -> None:
    """Inputs of few bits lie on ties, where it matters how x / scale is computed."""
    x = torch.randn(1000, SIZE, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    have, spec = codes_of(x, bits, block), level_4(block)
    assert torch.equal(have, quantize(x, choose_qparams(x, spec), spec).codes.float())
    other = replace(spec, divide="stored_inverse")  # x * (1 / scale), as on ARM
    assert (have != quantize(x, choose_qparams(x, other), other).codes).sum() > 50
