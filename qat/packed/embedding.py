"""An embedding of packed integers; only the rows that are looked up are dequantized."""

import torch
from torch import Tensor

from qat.packed.base import PackedLayer


class PackedEmbedding(PackedLayer):
    """Token ids (...) -> (..., in), in the dtype of the model."""

    def forward(self, input: Tensor) -> Tensor:
        return self.values(input.reshape(-1), self.dtype, self.offsets()).reshape(*input.shape, self.cols)


class PackedScaledEmbedding(PackedEmbedding):
    """Gemma's: times sqrt(hidden), in the dtype of the model."""

    scalar_embed_scale: float  # taken over from the float layer

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * torch.tensor(self.scalar_embed_scale, dtype=self.dtype, device=input.device)
