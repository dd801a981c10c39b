"""A linear layer computed in codes: against integers of numpy, torchao's own kernel, and the float layer's gradient."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch

import qat
from qat.affine import choose_qparams, quantize
from qat.kernels.integer_dot import exact_dot, instead, integer_linear

TOKEN = qat.QuantSpec(qtype="int8", range="absmax_half", divide="stored_inverse", scale="float32", integer_dot=True)
CHANNEL = qat.QuantSpec(qtype="int8")


@pytest.mark.parametrize("cols", [7, 1024, 1025, 5000])
def test_sums_are_those_of_integers(cols: int) -> None:
    a, b = (torch.randint(-128, 128, (n, cols)) for n in (5, 9))
    a[0], b[0] = -128, -128  # the largest sum there is
    b[1] = 127
    assert torch.equal(exact_dot(a.float(), b.float()), (a @ b.t()).float())


@pytest.mark.parametrize("cols", [64, 1280])
def test_it_is_torchaos_kernel(cols: int) -> None:
    int8 = pytest.importorskip("torchao.quantization.quantize_.workflows.int8.int8_tensor")
    from torchao.quantization.granularity import PerRow

    torch.manual_seed(0)
    x, bias = torch.randn(2, 40, cols), torch.randn(48)
    w = quantize(weight := torch.randn(48, cols), choose_qparams(weight, CHANNEL), CHANNEL)
    taken = int8.QuantizeTensorToInt8Kwargs(granularity=PerRow())
    zero = torch.zeros(48, 1, dtype=torch.int8)
    theirs = int8.Int8Tensor(w.codes, w.scale.float(), [1, cols], torch.float32, zero, act_quant_kwargs=taken)
    grid = choose_qparams(x.reshape(-1, cols), TOKEN)
    ours = integer_linear(x, grid, TOKEN, w.codes, w.scale, bias)
    assert torch.equal(ours, torch.nn.functional.linear(x, theirs, bias))


def test_a_layer_computes_so_in_evaluation_and_trains_as_before() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 64)
    nets: list[Any] = [
        qat.prepare(torch.nn.Sequential(deepcopy(layer)), [qat.Rule(scheme=qat.Scheme(weight=CHANNEL, input=spec))])
        for spec in (TOKEN, replace(TOKEN, integer_dot=False))
    ]
    x = torch.randn(30, 256)
    assert torch.equal(nets[0](x), nets[1](x))
    ours, plain = (n.eval()(x) for n in nets)
    assert not torch.equal(ours, plain)
    assert (ours - plain).abs().max() < 2e-6 * plain.abs().max()
    for out in (ours, plain):
        out.square().sum().backward()
    assert torch.allclose(nets[0][0].weight.grad, nets[1][0].weight.grad, rtol=1e-4, atol=1e-4)


def test_instead_gives_the_value_and_the_gradient() -> None:
    out = torch.ones(3, requires_grad=True)
    made = instead(out * 2, torch.full((3,), 5.0))
    made.sum().backward()
    assert made.tolist() == [5.0] * 3
    assert out.grad is not None
    assert out.grad.tolist() == [2.0] * 3


def test_grids_without_one_scale_a_row_are_refused() -> None:
    with pytest.raises(ValueError, match="one scale a row"):
        replace(TOKEN, block=(1, 32))
    with pytest.raises(ValueError, match="weights with one scale a row"):
        qat.Scheme(weight=qat.QuantSpec(qtype="int4", block=(1, 32)), input=TOKEN)
