"""Biases of static layers, moved to the int32 grid on which integer runtimes keep them.

A step of that grid is below a thousandth of an output step, so training does without it; but what is evaluated must be
the number that is shipped, hence `round_biases` before both.
"""

import torch
from torch import Tensor, nn

from qat.bias import LARGEST, bias_codes, bias_scale, bias_values
from qat.errors import UserError
from qat.modules.base import QuantLayer
from qat.quantizers.observed import Observed


@torch.no_grad()
def round_biases(model: nn.Module) -> int:
    """Round, in place, the bias of every layer that has a static input and one weight scale a row (or one in all) to
    its int32 grid; returns how many layers. Doing it again changes nothing.

    Call it on a calibrated model when its weights are final, before it is measured and before `convert`. Raises
    UserError naming a bias that the grid cannot hold, as its weights are almost zero.
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
                f"{path}.bias[{i}] = {float(bias[i]):.3g} is more than {LARGEST} steps of its grid: the weights of "
                "that channel are almost zero; set them to zero or leave this layer in floating point"
            )
        bias.copy_(bias_values(codes, scale))
        done += 1
    return done
