"""Gemma's embedding: nn.Embedding times sqrt(hidden), with a fake-quantized table."""

from torch import Tensor

from qat.modules.embedding import QuantEmbedding


class QuantScaledEmbedding(QuantEmbedding):
    embed_scale: Tensor  # float32 (), taken over from the float layer

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale.to(self.weight.dtype)
