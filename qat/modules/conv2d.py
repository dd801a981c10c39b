"""nn.Conv2d with a fake-quantized weight, as (out, in * kh * kw), and input."""

from torch import Tensor, nn

from qat.modules.base import QuantLayer


class QuantConv2d(QuantLayer, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """(n, in, h, w) -> (n, out, h', w'); the weight is quantized as (out, in * kh * kw)."""

    kind = "Conv2d"

    @staticmethod
    def canonical(weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.quantized_weight().view_as(self.weight)
        return self._conv_forward(self.quantized_input(input), weight, self.bias)
