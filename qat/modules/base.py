"""What the fake-quantized layers share: taking over a float layer, and the canonical (out, in) view of a weight."""

from typing import Self

from torch import Tensor, nn

from qat.kernels.block_sum import with_block_sums
from qat.kernels.integer_dot import instead, integer_linear
from qat.quantizers.base import FakeQuantize


class QuantLayer(nn.Module):
    """Mixed in before the float layer's class. kind: the float class's name.

    The float layer's attributes and parameters are taken over, not copied, so weights keep their identity (ties,
    optimisers) and their names in the state dict.
    """

    kind: str
    weight: Tensor
    bias: Tensor | None
    weight_quantizer: FakeQuantize | None
    input_quantizer: FakeQuantize | None

    @classmethod
    def from_float(cls, layer: nn.Module, weight: FakeQuantize | None, inputs: FakeQuantize | None) -> Self:
        """The float layer with these quantizers of its weight and its input; None leaves it in floating point."""
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
        """x, of any shape, as the integer layer sees it."""
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def quantized_weight(self) -> Tensor:
        """The weight (out, in) that the forward pass multiplies with."""
        w = self.canonical(self.weight)
        return w if self.weight_quantizer is None else self.weight_quantizer(w)

    def as_computed(self, out: Tensor, x: Tensor) -> Tensor:
        """The output for the float input x in the runtime's own arithmetic, where the input's spec tells it apart.

        Rounded block sums shift the output and count in training; an integer dot moves its last bit, so it is
        computed in evaluation alone.
        """
        taken, weight = self.input_quantizer, self.weight_quantizer
        if taken is None or weight is None or not (taken.enabled and weight.enabled):
            return out
        matrix = self.canonical(self.weight)
        if taken.spec.block_sum is not None:
            return with_block_sums(out, x, taken.spec, weight.qparams(matrix).offset)
        if not taken.spec.integer_dot or self.training:
            return out
        q = weight.quantize(matrix)
        grid = taken.qparams(x.reshape(-1, x.shape[-1]))
        return instead(out, integer_linear(x, grid, taken.spec, q.codes, q.scale, self.bias))
