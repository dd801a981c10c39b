"""Gradients of every quantizer against formulas in float64, written out element by element."""

import math

import pytest
import torch
from torch import Tensor

from qat.affine import QParams, choose_qparams, tile, untile
from qat.fake_quantize import fake_quantize
from qat.quantizers.fixed import Fixed
from qat.quantizers.lsq import LSQ, store_ste
from qat.quantizers.minmax import MinMax
from qat.scheme import QuantSpec


def data(rows: int = 6, cols: int = 64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(rows, cols, generator=g), torch.randn(rows, cols, generator=g)


def backward(q: torch.nn.Module, x: Tensor, g: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    q(leaf).backward(g)
    assert leaf.grad is not None
    return leaf.grad


def inside(x: Tensor, scale: Tensor, spec: QuantSpec, edge: float, zero: float | Tensor = 0.0) -> Tensor:
    """Which elements get a gradient, in float64."""
    y = tile(x, spec.block).double() / scale.double()[..., None, None] + torch.as_tensor(zero)
    return untile((y >= spec.type.qmin - edge) & (y <= spec.type.qmax + edge))


def test_minmax_passes_every_gradient_where_nothing_clips() -> None:
    x, g = data()
    for qtype in ("int2", "int4", "int8"):
        assert torch.equal(backward(MinMax(QuantSpec(qtype=qtype, block=(1, 32))), x, g), g)


def test_covers_is_true_only_where_no_value_lies_beyond_the_edge() -> None:
    """`covers` lets the fused layer leave the mask out: try it on every stored dtype and at the extremes."""
    x, _ = data(256, 64)
    for qtype in ("int2", "int3", "int4", "int5", "int6", "int7", "int8"):
        for scale in ("portable", "float16", "bfloat16", "float32"):
            for size in (1e-6, 1e-3, 1.0, 1e3):
                spec = QuantSpec(qtype=qtype, block=(1, 4), scale=scale)
                assert MinMax(spec).covers
                assert inside(x * size, choose_qparams(x * size, spec).scale.float(), spec, 0.5).all()
    half = QuantSpec(qtype="int4", block=(1, 4), range="absmax_half")
    assert not MinMax(half).covers
    assert not inside(x, choose_qparams(x, half).scale.float(), half, 0.5).all()
    assert not Fixed(QuantSpec(qtype="int4", block=(1, 4)), x, choose_qparams).covers


def test_the_clipped_extreme_of_absmax_half_keeps_training_up_to_half_a_step() -> None:
    """+absmax lies at 7.5 / 7 of the grid: codes 7; it gets its gradient unless the stored scale came out smaller."""
    x = torch.tensor([[7.5, -7.5, 3.0, 0.0]])
    spec = QuantSpec(qtype="int4", block=(1, 4), range="absmax_half", scale="float32")
    assert backward(MinMax(spec), x, torch.ones(1, 4)).tolist() == [[1.0, 1.0, 1.0, 1.0]]

    def smaller(t: Tensor, s: QuantSpec) -> QParams:
        return QParams(torch.tensor([[0.9]]))

    assert backward(Fixed(spec, x, smaller), x, torch.ones(1, 4)).tolist() == [[0.0, 1.0, 1.0, 1.0]]


def test_the_edge_itself() -> None:
    """int4, scale 1: the codes end at -8 and 7. Fixed and MinMax reach half a step further, LSQ does not."""
    x = torch.tensor([[-8.6, -8.5, -8.0, 7.0, 7.5, 7.6, 0.2, 1.0]])
    spec = QuantSpec(qtype="int4", block=(1, 8), scale="float32")
    fixed = Fixed(spec, x, lambda t, s: QParams(torch.ones(1, 1)))
    assert backward(fixed, x, torch.ones(1, 8)).tolist() == [[0, 1, 1, 1, 1, 0, 1, 1]]
    lsq = LSQ(spec, x)
    lsq.scale.data.fill_(1.0)
    assert backward(lsq, x, torch.ones(1, 8)).tolist() == [[0, 0, 1, 1, 0, 0, 1, 1]]


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(qtype="uint4", block=(1, 16), range="minmax", offset="zero_point"),
        QuantSpec(qtype="int8", block=(2, 32), range="minmax", offset="zero_point", scale="float32"),
    ],
)
def test_zero_points(spec: QuantSpec) -> None:
    x, g = data()
    grid = choose_qparams(x / 2, spec)
    mask = inside(x, grid.scale.float(), spec, 0.5, grid.offset[..., None, None].double())
    assert not mask.all()
    assert torch.equal(backward(Fixed(spec, x, lambda t, s: grid), x, g), g * mask)


@pytest.mark.parametrize("scale", ["float32", "portable", "float16", "bfloat16"])
@pytest.mark.parametrize("qtype", ["int2", "int4", "int8"])
@pytest.mark.parametrize("block", [(1, 16), (1, -1), (-1, -1)])
def test_lsq_scale_gradient_is_the_papers(qtype: str, block: tuple[int, int], scale: str) -> None:
    """Esser et al., equations 3 and 5, and the gradient scale of section 2.2, at the stored step size."""
    x, g = data()
    spec = QuantSpec(qtype=qtype, block=block, scale=scale)
    q = LSQ(spec, x)
    q.scale.data.mul_(0.7)  # off the range rule, where the extremes lie on the clip edge itself
    grad = backward(q, x, g)
    low, high = spec.type.qmin, spec.type.qmax
    v, up = tile(x, block).double(), tile(g, block).double()
    s = q.qparams(x).scale.detach().double()[..., None, None]
    y = v / s
    term = torch.where(
        y <= low, torch.tensor(float(low)), torch.where(y >= high, torch.tensor(float(high)), y.round() - y)
    )
    n = v.shape[-1] * v.shape[-2]
    want = (up * term).sum((-1, -2)) / math.sqrt(n * high)
    torch.testing.assert_close(q.scale.grad.double(), want, rtol=2e-5, atol=1e-6)
    assert torch.equal(grad, g * inside(x, s[..., 0, 0], spec, 0.0))


def test_lsq_starts_from_the_range_rule_and_keeps_its_sign() -> None:
    x, g = data()
    x[1] = 0
    spec = QuantSpec(qtype="int4", block=(1, 64), range="signed_max")
    q = LSQ(spec, x)
    ptq = choose_qparams(x, spec)
    assert torch.equal(fake_quantize(x, q.qparams(x), spec), fake_quantize(x, ptq, spec)), "before training it is PTQ"
    extreme = x.gather(1, x.abs().argmax(1, keepdim=True))
    assert torch.equal(q.sign, torch.where(extreme > 0, -1.0, 1.0))
    before = q.qparams(x).scale.detach().sign()
    with torch.no_grad():
        q.scale.neg_()  # an optimiser step through zero
    assert torch.equal(q.qparams(x).scale.detach().sign(), before)
    backward(q, x, g)
    assert (q.scale.grad != 0).any()


def test_lsq_learns_scales_far_below_one() -> None:
    """A gradient of 1e-8 survives the stored dtype, and a float32 scale may be as small as the weights need."""
    x, g = data()
    q = LSQ(QuantSpec(qtype="int8", block=(1, -1), scale="float16"), x)
    backward(q, x, g * 1e-8)
    assert (q.scale.grad.abs() > 0).all()
    small = LSQ(QuantSpec(qtype="int8", block=(1, -1), scale="float32"), x * 1e-5)
    error = (small(x * 1e-5) - x * 1e-5).abs().max()
    assert error < 1e-6


def test_lsq_refuses_what_it_cannot_learn() -> None:
    x, _ = data()
    for spec in (
        QuantSpec(qtype="uint4", range="minmax", offset="zero_point"),
        QuantSpec(qtype="int4", divide="exact"),
    ):
        with pytest.raises(ValueError, match="LSQ learns symmetric"):
            LSQ(spec, x)


def test_store_ste() -> None:
    s = torch.tensor([0.1, 1e-9, 3.0], requires_grad=True)
    out = store_ste(s, "portable")
    assert out.dtype == torch.float32
    assert out[1] == 2**-14
    out.backward(torch.tensor([1e-8, 2.0, 3.0]))
    assert s.grad.tolist() == pytest.approx([1e-8, 2.0, 3.0], rel=1e-7)


def test_gradients_of_a_learned_scale_and_offset() -> None:
    """value = scale * code + offset: finite differences where no code changes, the formulas elsewhere."""
    x, g = data(2, 8)
    spec = QuantSpec(qtype="uint3", block=(1, 8), range="minmax", offset="float32", scale="float32")
    scale = torch.tensor([[0.3], [0.2]], requires_grad=True)
    offset = torch.tensor([[-0.9], [-0.5]], requires_grad=True)
    fake_quantize(x, QParams(scale, offset), spec).backward(g)
    y = (x.double() - offset.double()) / scale.double()
    codes, mask = y.clamp(0, 7).round(), (y >= -0.5) & (y <= 7.5)
    torch.testing.assert_close(scale.grad.double(), (g * (codes - mask * y)).sum(1, keepdim=True), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(offset.grad.double(), (g.double() * ~mask).sum(1, keepdim=True), rtol=1e-5, atol=1e-6)


def test_a_disabled_quantizer_is_the_identity() -> None:
    x, g = data()
    q = MinMax(QuantSpec(qtype="int2", block=(1, 32)))
    q.enabled = False
    assert q(x) is x
    assert not torch.equal(MinMax(q.spec)(x), x)
    assert torch.equal(backward(q, x, g), g)


def test_any_leading_shape() -> None:
    x, _ = data(8, 64)
    q = MinMax(QuantSpec(qtype="int4", block=(1, 32)))
    assert torch.equal(q(x.view(2, 4, 64)), q(x).view(2, 4, 64))
