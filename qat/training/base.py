"""What every training task shares: the optimiser, and clipping that refuses gradients which are not finite."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from qat.errors import UserError
from qat.training.finite import REMEDY
from qat.training.optim import Optimizer


class Task(pl.LightningModule):
    """Trains `model`. Subclasses give the steps and log val/loss (nats) and their metric at every validation.

    field: the column of a batch that the model reads, by which data that belong to another task are refused.
    """

    field: str

    def __init__(self, *, model: nn.Module, optimizer: Optimizer) -> None:
        super().__init__()
        self.model, self.optimizer = model, optimizer
        self.grad_norm = torch.zeros(())

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW and its schedule over the trainer's max_steps."""
        return self.optimizer.build(self.model, self.trainer.max_steps)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by norm, keep the norm for the log. Lightning's own clipping refuses a fused AdamW.

        Raises UserError if a gradient is not finite, before it can spoil the weights.
        """
        named = [(name, p) for name, p in self.model.named_parameters() if p.grad is not None]
        self.grad_norm = nn.utils.get_total_norm([p.grad for _, p in named if p.grad is not None])
        if not torch.isfinite(self.grad_norm):
            bad = [name for name, p in named if p.grad is not None and not torch.isfinite(p.grad).all()]
            # the backward pass runs from the last layer to the first, so the last one listed was hit first
            where = f"first in {bad[-1]}" if bad else "their norm overflows"
            raise UserError(f"the gradients became non-finite at step {self.global_step}, {where}; {REMEDY}")
        if gradient_clip_val:  # as Lightning's own: 0 means no clipping
            nn.utils.clip_grads_with_norm_([p for _, p in named], gradient_clip_val, self.grad_norm)

    def items(self, batch: Any) -> int:
        """How many items (tokens, images) a batch has: speed is counted in them."""
        raise NotImplementedError
