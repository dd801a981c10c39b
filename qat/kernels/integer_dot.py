"""A linear layer as a kernel of integers computes it: an exact sum of products of codes, then the two scales.

float32(Σ code_x code_w) · scale_x · scale_w + bias, each step rounded to float32. The float product of the dequantized
values differs from it in the last bit, and a code of the next layer that sits on a tie flips with that bit.
Source: torchao 0.18, int8_tensor.py and `_int_scaled_matmul_cpu`.
"""

from typing import Any, cast

import torch
from torch import Tensor

from qat.affine import QParams, to_codes, untile
from qat.scheme import QuantSpec

EXACT = 1024  # products of 8-bit codes whose sum float32 holds exactly: 1024 * 128 * 128 = 2**24


def exact_dot(a: Tensor, b: Tensor) -> Tensor:
    """a (T, C) and b (R, C), float32 holding 8-bit codes -> the integer sums (T, R), rounded once to float32."""
    sums = [x @ y.t() for x, y in zip(a.split(EXACT, -1), b.split(EXACT, -1), strict=True)]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0, dtype=torch.float64).float()


@torch.no_grad()
def integer_linear(
    x: Tensor, qparams: QParams, spec: QuantSpec, codes: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """x (..., C) -> (..., R) in x's dtype.

    qparams, spec: the input's grid, one scale a row of x, no offset (`QuantSpec.integer_dot`). codes (R, C), scale
    (R, 1): the weight's. The steps are in float32, or in float64 if x is.
    """
    rows = x.reshape(-1, x.shape[-1])
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        sums = exact_dot(untile(to_codes(rows, qparams, spec)), codes.float()).to(dtype)
        out = sums * qparams.scale.to(dtype) * scale.to(dtype).flatten()
        if bias is not None:
            out = out + bias
    return out.reshape(*x.shape[:-1], -1).to(x.dtype)


class _Instead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def instead(out: Tensor, value: Tensor) -> Tensor:
    """The value, with the gradient of `out`, which is the same but for rounding."""
    return cast(Tensor, _Instead.apply(out, value.to(out.dtype)))
