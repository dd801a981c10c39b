"""Biases of integer layers: int32 codes whose scale is input scale * weight scale, so that they add to accumulators.

A step of that grid is a few hundredths of a percent of an output step, so training does without it; but what is
evaluated and shipped must be the same number, hence `round_biases` before both.
"""

import torch
from torch import Tensor, nn

from qat.errors import UserError
from qat.modules.base import QuantLayer
from qat.quantizers.observed import Observed

LARGEST = 2**23  # beyond it, code * scale in float32 no longer names one code


def bias_scale(input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """float32 [out]: the scale of a bias, for an input's scale (1, 1) and a weight's [out, 1] or [1, 1]."""
    return (input_scale.float() * weight_scale.float()).flatten()


def bias_codes(bias: Tensor, scale: Tensor) -> Tensor:
    """int64 [out]: float32 bias / scale, rounded half-even (in float64, where the quotient is as good as exact)."""
    return (bias.double() / scale.double()).round().long()


@torch.no_grad()
def round_biases(model: nn.Module) -> int:
    """Move, in place, the bias of every layer with a static input and a weight scale for each row (or one) to its
    int32 grid; returns how many layers. Doing it twice changes nothing. Call it on a calibrated model when its
    weights are final (or before measuring it), before `convert`.

    Raises UserError naming a bias that the grid cannot hold: its weights are almost zero.
    """
    done = 0
    for path, layer in model.named_modules():
        if not isinstance(layer, QuantLayer) or getattr(layer, "bias", None) is None:
            continue
        weight, inputs = layer.weight_quantizer, layer.input_quantizer
        if weight is None or not isinstance(inputs, Observed) or weight.spec.block not in ((1, -1), (-1, -1)):
            continue
        matrix = layer.canonical(layer.weight)
        scale = bias_scale(inputs.qparams(matrix).scale, weight.qparams(matrix).scale)
        bias: Tensor = layer.bias  # type: ignore[assignment]
        codes = bias_codes(bias, scale)
        if (codes.abs() > LARGEST).any():
            i = int(codes.abs().argmax())
            raise UserError(
                f"{path}.bias[{i}] = {float(bias[i]):.3g} is more than {LARGEST} steps of its grid: the weights of that "
                "channel are almost zero; set them to zero (prune the channel) or leave this layer in floating point"
            )
        bias.copy_(codes.float() * scale)
        done += 1
    return done
