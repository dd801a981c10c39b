"""Fake-quantization: the values that a tensor's codes stand for, with the straight-through gradient."""

import typing
from typing import Any

import torch
from torch import Tensor

from qat.affine import QParams, from_codes, quotients, tile, untile
from qat.rounding import round_
from qat.scheme import QuantSpec


class _FakeQuantize(torch.autograd.Function):
    """from_codes(to_codes(x)) with the straight-through gradient: exactly that of x inside the edge, else zero.

    scale (and a floating offset) may need a gradient: d(value)/d(scale) = code - [inside] x / scale, LSQ's formula.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        grid, spec, edge = QParams(*args[:4]), args[4], args[5]
        y, low, high = quotients(x, grid, spec)
        ctx.spec, ctx.learned = spec, any(ctx.needs_input_grad[1:3])
        outside = (y < low - edge) | (y > high + edge)
        steps = round_(y.clamp(low, high), spec.rounding, spec.type.qmin)  # pyright: ignore
        ctx.exact = grid.exact_scale is not None
        ctx.save_for_backward(outside, *((y, steps) if ctx.learned else ()))
        offset = None if spec.offset == "zero_point" else grid.offset  # the zero point is taken off already
        return from_codes(steps, grid.scale, offset, spec, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        outside, *rest = ctx.saved_tensors
        g = tile(grads[0].float(), ctx.spec.block)
        passed = g.masked_fill(outside, 0.0)
        scale = offset = None
        if ctx.learned:
            y, steps = rest
            scale = (g * (steps if ctx.exact else steps - y.masked_fill(outside, 0.0))).sum((-1, -2))
            offset = (g if ctx.exact else g - passed).sum((-1, -2)) if ctx.needs_input_grad[2] else None
        return untile(passed).to(grads[0].dtype), scale, offset, None, None, None, None


def fake_quantize(x: Tensor, qparams: QParams, spec: QuantSpec, edge: float = 0.5) -> Tensor:
    """x (R, C) -> the values its codes stand for, in x's dtype; equal to dequantize(quantize(x)), bit for bit.

    Differentiable. edge: how far beyond qmin..qmax, in steps, a value still gets a gradient. 0.5 covers every value
    that rounds to a code (so the clipped extreme of an absmax_half block keeps training); 0 is LSQ's hard edge.
    """
    return typing.cast(Tensor, _FakeQuantize.apply(x, *qparams, spec, edge))  # pyright: ignore[reportUnknownMemberType]
