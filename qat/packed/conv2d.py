"""nn.Conv2d of packed integers, as (out, in * kh * kw)."""

from torch import Tensor, nn

from qat.packed.base import PackedLayer


class PackedConv2d(PackedLayer):
    """Stride, padding, dilation and groups are those of the layer it stands in for."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        x = self.quantized_input(input)
        return nn.Conv2d._conv_forward(self, x, self.dense(x.dtype).view(self.shape), self.bias)  # type: ignore[arg-type]
