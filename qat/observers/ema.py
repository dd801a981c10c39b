"""The moving average of each batch's smallest and largest value: one outlier batch moves the range only a little."""

import torch
from torch import Tensor

from qat.errors import UserError
from qat.observers.base import Observer
from qat.scheme import QuantSpec


class EMAObserver(Observer):
    """low += momentum * (the batch's low - low), and the same for high; the first batch sets both.

    The rule of torch.ao's MovingAverageMinMaxObserver. Raises UserError unless 0 < momentum <= 1.
    """

    def __init__(self, *, momentum: float = 0.01) -> None:
        super().__init__()
        if not 0 < momentum <= 1:
            raise UserError(f"the moving average's momentum is {momentum}; it must be above 0 and at most 1")
        self.momentum = momentum
        self.low: Tensor
        self.high: Tensor
        self.empty: Tensor
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(0.0))
        self.register_buffer("empty", torch.tensor(True))

    def update(self, x: Tensor) -> None:
        low, high = x.detach().float().aminmax()
        for state, seen in ((self.low, low), (self.high, high)):
            state.copy_(torch.where(self.empty, seen, state + self.momentum * (seen - state)))
        self.empty.fill_(False)

    def range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return self.low, self.high
