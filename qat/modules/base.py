"""What the fake-quantized layers share: taking over a float layer, and the canonical (out, in) view of a weight."""

from typing import Self

from torch import Tensor, nn

from qat.kernels.block_sum import with_block_sums
from qat.quantizers.base import FakeQuantize


class QuantLayer(nn.Module):
    """Mixed in before the float layer's class. kind: the float class's name.

    The float layer's attributes and parameters are taken over, not copied, so weights keep their identity (ties,
    optimisers) and their names in the state dict.
    """

    kind: str
    weight: Tensor
    weight_quantizer: FakeQuantize | None
    input_quantizer: FakeQuantize | None

    @classmethod
    def from_float(cls, layer: nn.Module, weight: FakeQuantize | None, inputs: FakeQuantize | None) -> Self:
        new = cls.__new__(cls)
        new.__dict__.update(layer.__dict__)
        for registry in ("_parameters", "_buffers", "_modules"):
            new.__dict__[registry] = dict(layer.__dict__[registry])
        new.weight_quantizer = weight
        new.input_quantizer = inputs
        return new

    @staticmethod
    def canonical(weight: Tensor) -> Tensor:
        """The weight as (out, in)."""
        return weight

    def quantized_input(self, x: Tensor) -> Tensor:
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def quantized_weight(self) -> Tensor:
        """The weight (out, in) that the forward pass multiplies with."""
        w = self.canonical(self.weight)
        return w if self.weight_quantizer is None else self.weight_quantizer(w)

    def with_block_sums(self, out: Tensor, x: Tensor) -> Tensor:
        """The output for the float input x as a runtime with rounded block sums has it (`QuantSpec.block_sum`)."""
        taken, weight = self.input_quantizer, self.weight_quantizer
        if taken is None or taken.spec.block_sum is None or not taken.enabled or weight is None:
            return out
        return with_block_sums(out, x, taken.spec, weight.qparams(self.canonical(self.weight)).offset)
