"""An embedding of packed integers; only the rows that are looked up are dequantized."""

from torch import Tensor

from qat.packed.base import PackedLayer


class PackedEmbedding(PackedLayer):
    """Token ids (...) -> (..., in), in the dtype of the model."""

    def forward(self, input: Tensor) -> Tensor:
        return self.values(input.reshape(-1), self.dtype, self.offsets()).reshape(*input.shape, self.cols)
