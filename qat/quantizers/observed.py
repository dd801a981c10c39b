"""Observed: a static grid for activations. An observer watches a stream; the range is then fixed."""

from collections.abc import Callable

import torch
from torch import Tensor

from qat.affine import QParams, qparams_from_range
from qat.errors import UserError
from qat.observers.base import Observer
from qat.quantizers.base import FakeQuantize
from qat.scheme import STORED, QuantSpec


class Observed(FakeQuantize):
    """scale, offset: (1, 1), in the state dict with the observer's own state, so a resume continues exactly.

    calibrating: every batch updates the observer and the grid. active: so does every training batch, until frozen.
    """

    def __init__(self, spec: QuantSpec, observer: Callable[[], Observer]) -> None:
        super().__init__(spec)
        self.calibrating = False
        self.observer = observer()
        self.scale: Tensor
        self.offset: Tensor | None
        self.register_buffer("scale", torch.ones(1, 1, dtype=STORED[spec.scale]))
        dtype = torch.int32 if spec.offset == "zero_point" else STORED[spec.offset or "float32"]
        self.register_buffer("offset", None if spec.offset is None else torch.zeros(1, 1, dtype=dtype))
        self.batches: Tensor
        self.register_buffer("batches", torch.tensor(0))
        self.active: Tensor  # a buffer, so that "frozen" survives a resume
        self.register_buffer("active", torch.tensor(True))

    def observe(self, x: Tensor) -> None:
        """Update the range and the grid from one batch. Raises UserError if x holds NaN or infinity."""
        if x.numel() == 0:
            return
        if not torch.isfinite(x).all():
            raise UserError("an activation that is being calibrated holds NaN or infinity; check the model and data")
        self.observer.update(x)
        self.batches += 1
        low, high = self.observer.range(self.spec)
        q = qparams_from_range(low.reshape(1, 1), high.reshape(1, 1), self.spec)
        self.scale.copy_(q.scale)
        if self.offset is not None and q.offset is not None:
            self.offset.copy_(q.offset)

    def forward(self, x: Tensor) -> Tensor:
        if self.calibrating or (self.training and self.active):
            self.observe(x.detach())
        return super().forward(x)

    def qparams(self, x: Tensor) -> QParams:
        return QParams(self.scale, self.offset)
