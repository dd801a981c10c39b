"""The smallest and largest value seen."""

import torch
from torch import Tensor

from qat.observers.base import Observer
from qat.scheme import QuantSpec


class MinMaxObserver(Observer):
    def __init__(self) -> None:
        super().__init__()
        self.low: Tensor
        self.high: Tensor
        self.register_buffer("low", torch.tensor(torch.inf))
        self.register_buffer("high", torch.tensor(-torch.inf))

    def update(self, x: Tensor) -> None:
        low, high = x.detach().float().aminmax()
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))

    def range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return self.low, self.high
