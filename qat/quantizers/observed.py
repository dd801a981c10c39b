"""Observed: a static grid for activations. An observer watches a stream; the range is then fixed."""

from collections.abc import Callable

import torch
from torch import Tensor

from qat.affine import QParams, qparams_from_range
from qat.errors import UserError
from qat.observers.base import Observer
from qat.quantizers.base import FakeQuantize
from qat.scheme import QuantSpec, stored_dtype


class Observed(FakeQuantize):
    """scale, offset: (1, 1), in the state dict with the observer's own state, so a resume continues exactly.

    calibrating: every batch updates the observer, and setting it back to False updates the grid. active: every
    training batch updates both, until frozen.
    """

    def __init__(self, spec: QuantSpec, observer: Callable[[], Observer]) -> None:
        super().__init__(spec)
        self._calibrating = False
        self._ready = False  # `batches` is known not to be 0: spares a look at a device tensor on every step
        self.observer = observer()
        self.scale: Tensor
        self.offset: Tensor | None
        self.register_buffer("scale", torch.ones(1, 1, dtype=stored_dtype(spec.scale)))
        dtype = torch.int32 if spec.offset == "zero_point" else stored_dtype(spec.offset or "float32")
        self.register_buffer("offset", None if spec.offset is None else torch.zeros(1, 1, dtype=dtype))
        self.batches: Tensor
        self.register_buffer("batches", torch.tensor(0))
        self.active: Tensor  # a buffer, so that "frozen" survives a resume
        self.register_buffer("active", torch.tensor(True))

    @property
    def calibrating(self) -> bool:
        return self._calibrating

    @calibrating.setter
    def calibrating(self, value: bool) -> None:
        ended = self._calibrating and not value
        self._calibrating = value
        if ended and int(self.batches) > 0:
            self.update_grid()  # once, not after each batch: a search over a histogram takes milliseconds

    def observe(self, x: Tensor) -> None:
        """Let the observer see one batch. Raises UserError if x holds NaN or infinity."""
        if x.numel() == 0:
            return
        if not torch.isfinite(x).all():
            raise UserError("an activation that is being calibrated holds NaN or infinity; check the model and data")
        self.observer.update(x)
        self.batches += 1

    def update_grid(self) -> None:
        """Scale and offset from what the observer has seen. Raises UserError if the scale overflows its dtype."""
        low, high = self.observer.range(self.spec)
        q = qparams_from_range(low.reshape(1, 1), high.reshape(1, 1), self.spec)
        if not torch.isfinite(q.scale).all():
            raise UserError(f"activations up to {float(high):.3g} overflow {self.spec.scale} scales; use float32")
        self.scale.copy_(q.scale)
        if self.offset is not None and q.offset is not None:
            self.offset.copy_(q.offset)

    def forward(self, x: Tensor) -> Tensor:
        if self._calibrating:
            self.observe(x.detach())
        elif self.training and self.active and x.numel():
            self.observe(x.detach())
            self.update_grid()
        return super().forward(x)

    def qparams(self, x: Tensor) -> QParams:
        if not self._ready:
            if int(self.batches) == 0:
                raise UserError("a static input range is used before any batch was seen: call qat.calibrate first")
            self._ready = True
        return QParams(self.scale, self.offset)
