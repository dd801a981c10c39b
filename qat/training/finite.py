"""Stops at the first non-finite loss, before it spoils the weights, and says which layer it came from."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from qat.errors import UserError

REMEDY = "lower optimizer.lr, lengthen optimizer.warmup_steps, or set trainer.precision=32-true"


class StopOnNonFinite(pl.Callback):
    """Checks every loss before its backward pass; gradients are checked where they are clipped."""

    def __init__(self) -> None:
        self.batch: Any = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch, to run it again should its loss be bad."""
        self.batch = batch

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Raise UserError with step, layer and remedy if the loss is not finite."""
        if not torch.isfinite(loss):
            layer = first_non_finite(pl_module, self.batch)
            raise UserError(f"the loss became {loss.item()} at step {trainer.global_step}: {layer}; {REMEDY}")


@torch.no_grad()
def first_non_finite(module: pl.LightningModule, batch: Any) -> str:
    """Runs the batch again and names the first parameter or layer output that is not finite."""
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the weights of {name} are not finite"
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not torch.isfinite(tensor).all():
                found.append(f"first non-finite output in layer {name} ({type(layer).__name__})")

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in module.named_modules() if name]
    try:
        module.training_step(batch, 0)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "no layer's output is non-finite, so it is the loss itself"
