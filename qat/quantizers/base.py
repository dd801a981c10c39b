"""What every training-time quantizer is: state, and a rule for choosing scales. The arithmetic is not its business."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from qat.affine import QParams, QTensor, dequantize, quantize
from qat.fake_quantize import fake_quantize
from qat.scheme import QuantSpec


class FakeQuantize(nn.Module):
    """Subclasses supply `qparams`; `forward` and `quantize` are written once, so training and packing cannot diverge.

    enabled: False passes tensors through untouched (delayed quantization).
    edge: how far beyond the codes, in steps, the weight still gets a gradient (see `fake_quantize`).
    covers: no value of the tensor can lie beyond the edge, so every one gets its gradient.
    row_local: the grid of a row depends on nothing but that row, so a lookup may quantize only the rows it reads.
    derived: `qparams` is always `choose_qparams` (see `affine.quantize`).
    """

    edge: float = 0.5
    covers: bool = False
    row_local: bool = False
    derived: bool = False

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec
        self.enabled = True

    @abstractmethod
    def qparams(self, x: Tensor) -> QParams:
        """The grid for x (R, C): scale and offset, each (R/r, C/c)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> the values that its codes stand for, same shape and dtype."""
        if not self.enabled:
            return x
        rows = x.reshape(-1, x.shape[-1])
        return fake_quantize(rows, self.qparams(rows), self.spec, self.edge).reshape(x.shape)

    @torch.no_grad()
    def quantize(self, x: Tensor) -> QTensor:
        """The codes of x (R, C). Raises ValueError if x is not finite."""
        return quantize(x, self.qparams(x), self.spec, self.derived)

    def dequantized(self, x: Tensor) -> Tensor:
        """The float32 values that the codes of x (R, C) stand for, whether or not `enabled`."""
        return dequantize(self.quantize(x))

    def extra_repr(self) -> str:
        return self.spec.label()
