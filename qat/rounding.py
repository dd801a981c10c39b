"""Rounding of float32 numbers: to integers, and to the dtype in which a scale will be stored."""

import torch
from torch import Tensor

from qat.scheme import STORED

PORTABLE_MIN = 2.0**-14  # float16's smallest normal number


def round_(y: Tensor, rounding: str, qmin: int) -> Tensor:
    """Round y (float32), in place, to the nearest integers under the named rule of `QuantSpec.rounding`; returns y."""
    if rounding == "half_even":
        return y.round_()
    if rounding == "toward_zero":
        return y.trunc_()
    if rounding == "half_up":  # ggml adds 8.5 and truncates: the sum is rounded to float32, on purpose
        return y.add_(0.5 - qmin).floor_().add_(qmin)
    whole = y.trunc()  # half away from zero, as C's roundf: adding 0.5 would round 0.49999997 up
    return y.copy_(whole + torch.where((y - whole).abs() >= 0.5, y.sign(), torch.zeros_like(y)))


def cast(value: Tensor, dtype: str) -> Tensor:
    """A float32 number in the stored dtype; "portable" goes through bfloat16 (overflow gives an infinity).

    torch.compile keeps intermediate results in float32 and drops casts to a narrower dtype and back, so there the
    rounding is spelled out in integers, and the casts that may be dropped are exact.
    """
    if torch.compiler.is_compiling():
        if dtype in ("portable", "bfloat16"):
            value = _keep_bits(value, 16)
        if dtype in ("portable", "float16"):
            subnormal = (value * 2.0**24).round() * 2.0**-24
            value = torch.where(value.abs() < 2.0**-14, subnormal, _keep_bits(value, 13))
            value = torch.where(value.abs() > 65504.0, value * torch.inf, value)
    elif dtype == "portable":
        value = value.to(torch.bfloat16)
    return value.to(STORED[dtype])


def cast_normal(value: Tensor, dtype: str) -> Tensor:
    """The same with a magnitude of at least the dtype's smallest normal number."""
    tiny = PORTABLE_MIN if dtype == "portable" else torch.finfo(STORED[dtype]).tiny
    clamped = value.abs().clamp(min=tiny).copysign(value)  # NaN passes, to be reported by `quantize`
    return cast(clamped, dtype)


def _keep_bits(value: Tensor, drop: int) -> Tensor:
    """A float32 rounded half-even to a significand without its last `drop` bits; NaN and infinities pass."""
    bits = value.view(torch.int32)
    rounded = (bits + (2 ** (drop - 1) - 1) + ((bits >> drop) & 1)) & -(2**drop)
    return torch.where(value.isnan(), value, rounded.view(torch.float32))
