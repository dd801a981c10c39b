"""nn.Embedding with a fake-quantized table; only the rows that are looked up are quantized where the grid allows it."""

import torch.nn.functional as F
from torch import Tensor, nn

from qat.modules.base import QuantLayer


class QuantEmbedding(QuantLayer, nn.Embedding):  # pyright: ignore[reportIncompatibleVariableOverride]
    """ids (...) -> (..., width); where the grid lies within rows, only those looked up are quantized."""

    kind = "Embedding"

    def forward(self, input: Tensor) -> Tensor:
        q = self.weight_quantizer
        if q is not None and q.row_local:
            return q(F.embedding(input, self.weight, self.padding_idx))
        return F.embedding(input, self.quantized_weight(), self.padding_idx)
