"""The int32 grid of biases in integer layers: scale = input scale * weight scale, so that codes add to accumulators."""

from torch import Tensor

LARGEST = 2**23  # beyond it, code * scale in float32 no longer names one code


def bias_scale(input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """float32 [out] (or [1]), for an input's scale (1, 1) and a weight's (out, 1) or (1, 1)."""
    return (input_scale.float() * weight_scale.float()).flatten()


def bias_codes(bias: Tensor, scale: Tensor) -> Tensor:
    """int32 [out]: float32 bias / scale, rounded half-even (in float64, where the quotient is as good as exact) and
    limited to 2 * LARGEST: what is beyond LARGEST the grid cannot hold."""
    return (bias.double() / scale.double()).round().clamp(-2 * LARGEST, 2 * LARGEST).int()


def bias_values(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 [out]: what the codes stand for."""
    return codes.float() * scale.float()
