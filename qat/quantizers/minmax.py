"""MinMax: the grid is derived from the tensor itself on every step. Weights, and dynamic activations."""

from torch import Tensor

from qat.affine import QParams, choose_qparams
from qat.quantizers.base import FakeQuantize
from qat.scheme import QuantSpec


class MinMax(FakeQuantize):
    """Stateless. tensor: ignored; every weight quantizer is constructed as `factory(spec, tensor)`."""

    def __init__(self, spec: QuantSpec, tensor: Tensor | None = None) -> None:
        super().__init__(spec)
        self.derived = type(self).qparams is MinMax.qparams  # a subclass may choose another grid
        self.row_local = spec.block[0] == 1
        # |x| <= absmax, and storing the scale moves the quotient by at most 2**-9 of qmax <= 127: within half a step
        self.covers = spec.range == "absmax"

    def qparams(self, x: Tensor) -> QParams:
        return choose_qparams(x.detach(), self.spec)
