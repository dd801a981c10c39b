"""GPT-2's Conv1D, a linear layer stored as (in, out), with a fake-quantized weight and input.

Blocks run along `in`, as in every runtime, so the weight is quantized as its transpose.
"""

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from qat.kernels.linear import fake_linear
from qat.modules.base import QuantLayer


class QuantConv1D(QuantLayer, Conv1D):  # pyright: ignore[reportIncompatibleVariableOverride]
    """x (..., in) -> (..., out) by transformers' Conv1D, whose weight lies (in, out)."""

    kind = "Conv1D"

    @staticmethod
    def canonical(weight: Tensor) -> Tensor:
        return weight.t()

    def forward(self, x: Tensor) -> Tensor:
        x_hat = self.quantized_input(x)
        out = fake_linear(x_hat, self.weight, self.bias, self.weight_quantizer, transposed=True)
        return self.as_computed(out, x)
