"""nn.Linear with a fake-quantized weight and input."""

import torch.nn.functional as F
from torch import Tensor, nn

from qat.modules.base import QuantLayer


class QuantLinear(QuantLayer, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    kind = "Linear"

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.quantized_input(x), self.quantized_weight(), self.bias)
