"""Fixed: the grid is chosen once, by an initialiser of `qat.ptq`, and stays while the weights train."""

from collections.abc import Callable

from torch import Tensor

from qat.affine import QParams
from qat.quantizers.base import FakeQuantize
from qat.scheme import QuantSpec


class Fixed(FakeQuantize):
    """init: (tensor (R, C), spec) -> QParams, for instance `qat.ptq.mse.search`. The grid is in the state dict."""

    def __init__(self, spec: QuantSpec, tensor: Tensor, init: Callable[[Tensor, QuantSpec], QParams]) -> None:
        super().__init__(spec)
        for name, value in init(tensor.detach(), spec)._asdict().items():
            self.register_buffer(name, value)

    def qparams(self, x: Tensor) -> QParams:
        return QParams(self.scale, self.offset, self.exact_scale, self.exact_offset)  # pyright: ignore[reportArgumentType]
