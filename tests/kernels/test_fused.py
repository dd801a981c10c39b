"""The fused linear layer against F.linear(x, quantizer(weight), bias): values, gradients, memory, autocast."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qat.affine import choose_qparams
from qat.kernels import chunks as chunking
from qat.kernels.chunks import chunks, fake_quantized
from qat.kernels.linear import fake_linear
from qat.quantizers.base import FakeQuantize
from qat.quantizers.fixed import Fixed
from qat.quantizers.lsq import LSQ
from qat.quantizers.minmax import MinMax
from qat.scheme import ROUNDINGS, QuantSpec

ROWS, COLS = 96, 128
SPECS = {
    "int4 group": QuantSpec(qtype="int4", block=(1, 32)),
    "int8 channel": QuantSpec(qtype="int8", block=(1, -1), scale="float32"),
    "int8 tensor": QuantSpec(qtype="int8", block=(-1, -1), scale="float32"),
    "int4 half": QuantSpec(qtype="int4", block=(1, 32), range="absmax_half", divide="stored_inverse"),
    "ggml": QuantSpec(
        qtype="int4", block=(1, 32), range="signed_max", rounding="half_up", divide="exact_inverse", scale="float16"
    ),
    "zero point": QuantSpec(qtype="uint4", block=(16, 16), range="minmax", offset="zero_point"),
    "float offset": QuantSpec(qtype="uint3", block=(4, 64), range="minmax", offset="float16"),
    "mlx": QuantSpec(qtype="uint4", block=(1, 64), range="mlx", offset="float16", divide="exact", scale="float16"),
    "column": QuantSpec(qtype="int3", block=(-1, 1), rounding="half_away"),
    "truncated": QuantSpec(qtype="int2", block=(1, 32), rounding="toward_zero", scale="bfloat16"),
}


def narrow(tensor: Tensor, spec: QuantSpec):
    """A grid that clips: that of the tensor halved."""
    return choose_qparams(tensor / 2, spec)


KINDS: dict[str, Callable[[QuantSpec, Tensor], FakeQuantize]] = {
    "minmax": MinMax,
    "fixed": lambda spec, w: Fixed(spec, w, narrow),
    "lsq": LSQ,
}
CASES = [
    (s, k) for s in SPECS for k in KINDS if k != "lsq" or (SPECS[s].offset is None and SPECS[s].divide == "stored")
]


@pytest.fixture(autouse=True)
def many_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "ELEMENTS", 2048)


def parts(spec: QuantSpec, kind: str, transposed: bool, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    w = torch.randn(ROWS, COLS) * 0.05
    w[5] = 0
    weight = torch.nn.Parameter((w.t().contiguous() if transposed else w).to(dtype))
    bias = torch.nn.Parameter(torch.randn(ROWS).to(dtype))
    x = torch.randn(3, 7, COLS).to(dtype).requires_grad_()
    return x, weight, bias, KINDS[kind](spec, w.to(dtype))


def step(f: Callable, x: Tensor, weight: Tensor, bias: Tensor, q: FakeQuantize, transposed: bool):
    """Output and the gradients of input, weight, bias and quantizer parameters of a fixed loss."""
    tensors = [x, weight, bias, *q.parameters()]
    for t in tensors:
        t.grad = None
    out = f(x, weight, bias, q, transposed)
    factor = torch.sin(torch.arange(out.numel(), dtype=torch.float32)).view(out.shape)
    (out.float() * factor).sum().backward()
    return [out.detach(), *(t.grad.clone() for t in tensors)]


def plain(x: Tensor, weight: Tensor, bias: Tensor, q: FakeQuantize, transposed: bool) -> Tensor:
    return F.linear(x, q(weight.t() if transposed else weight), bias)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("spec", "kind"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_equal_the_plain_expression(
    spec: str, kind: str, transposed: bool, dtype: torch.dtype
) -> None:
    args = parts(SPECS[spec], kind, transposed, dtype)
    _, weight, _, q = args
    w = weight.detach().t() if transposed else weight.detach()
    assert torch.equal(fake_quantized(w, q.qparams(w), q.spec, dtype), q(w))
    assert torch.equal(fake_quantized(w, q.qparams(w), q.spec, dtype, q.covers), q(w))
    ours, theirs = step(fake_linear, *args, transposed), step(plain, *args, transposed)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype
        if (i == 2 and transposed) or i == 4:  # another order of summation: a transposed product; sums over pieces
            torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-4)
            assert torch.equal(a == 0, b == 0)
        else:
            assert torch.equal(a, b), ("output", "input", "weight", "bias")[i]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["minmax", "lsq"])
def test_autocast(kind: str, transposed: bool) -> None:
    args = parts(SPECS["int4 group"], kind, transposed)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = step(fake_linear, *args, transposed), step(plain, *args, transposed)
    assert ours[0].dtype == torch.bfloat16
    assert ours[2].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(ours[:2], theirs[:2], strict=True))
    torch.testing.assert_close(ours[2:], theirs[2:], rtol=1e-2, atol=1e-3)


def test_gradient_checkpointing() -> None:
    args = parts(SPECS["int4 group"], "lsq", False)
    again = step(lambda *a: checkpoint(fake_linear, *a, use_reentrant=False), *args, False)
    assert all(torch.equal(a, b) for a, b in zip(again, step(fake_linear, *args, False), strict=True))


def test_two_layers_share_the_buffer_without_mixing() -> None:
    x, w1, b, q1 = parts(SPECS["int4 group"], "minmax", False)
    w2 = torch.nn.Parameter(torch.randn(64, ROWS))
    q2 = MinMax(SPECS["int8 channel"])

    def run(f: Callable) -> list[Tensor]:
        out = f(torch.relu(f(x, w1, b, q1, False)), w2, None, q2, False)
        return [out, *torch.autograd.grad(out.square().sum(), [x, w1, w2])]

    assert all(torch.equal(a, b) for a, b in zip(run(fake_linear), run(plain), strict=True))


def test_only_input_weight_and_scales_are_saved() -> None:
    x, weight, bias, q = parts(SPECS["int4 group"], "minmax", False)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fake_linear(x, weight, bias, q)
    assert {t.data_ptr() for t in saved} >= {x.data_ptr(), weight.data_ptr()}
    rest = [t for t in saved if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert sum(t.nbytes for t in rest) <= weight.nbytes // 32


def test_a_quantizer_that_is_off_is_a_plain_layer() -> None:
    x, weight, bias, q = parts(SPECS["int4 group"], "minmax", False)
    q.enabled = False
    assert torch.equal(fake_linear(x, weight, bias, q), F.linear(x, weight, bias))
    assert torch.equal(fake_linear(x, weight, bias, None), F.linear(x, weight, bias))


def test_inference_mode_first_and_training_after() -> None:
    chunking._scratch.__dict__.clear()
    args = parts(SPECS["int4 group"], "minmax", False)
    with torch.inference_mode():
        fake_linear(args[0], args[1], args[2], args[3])
    assert torch.equal(step(fake_linear, *args, False)[0], step(plain, *args, False)[0])


def test_no_gradient_is_computed_that_nobody_needs() -> None:
    x, weight, bias, q = parts(SPECS["int4 group"], "fixed", False)
    weight.requires_grad_(False)
    out = fake_linear(x, weight, bias, q)
    out.sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(x.grad, q(weight).sum(0).expand(3, 7, COLS))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_chunks_cover_every_element_once(spec: str, transposed: bool) -> None:
    w = torch.zeros(COLS, ROWS).t() if transposed else torch.zeros(ROWS, COLS)
    pieces = list(chunks(w, SPECS[spec]))
    assert len(pieces) > 1
    for c in pieces:
        c.of(w).add_(1)
    assert torch.equal(w, torch.ones(ROWS, COLS))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("qtype", ["int2", "int3", "int4", "int8"])
@pytest.mark.parametrize("scale", ["portable", "float16", "float32"])
def test_leaving_the_clamp_out_changes_nothing_where_the_grid_covers(rounding: str, qtype: str, scale: str) -> None:
    for divide in ("stored", "exact", "stored_inverse", "exact_inverse"):
        spec = QuantSpec(qtype=qtype, block=(1, 4), rounding=rounding, scale=scale, divide=divide)
        sizes = 10.0 ** torch.arange(-6, 2).repeat(64)[:, None]
        w = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)) * sizes
        qp = choose_qparams(w, spec)
        assert MinMax(spec).covers
        kept = fake_quantized(w, qp, spec, torch.float32).clone()
        assert torch.equal(fake_quantized(w, qp, spec, torch.float32, covers=True), kept)
