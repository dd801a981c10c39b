"""nn.Linear with a fake-quantized weight and input."""

from torch import Tensor, nn

from qat.kernels.linear import fake_linear
from qat.modules.base import QuantLayer


class QuantLinear(QuantLayer, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """x (..., in) -> (..., out), weight (out, in) and input fake-quantized."""

    kind = "Linear"

    def forward(self, x: Tensor) -> Tensor:
        out = fake_linear(self.quantized_input(x), self.weight, self.bias, self.weight_quantizer)
        return self.as_computed(out, x)
