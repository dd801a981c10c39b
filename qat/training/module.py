"""Training of any causal language model of transformers."""

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from qat.training.base import Task
from qat.training.optim import Optimizer

Batch = dict[str, Tensor]


class CausalLM(Task):
    """Next-token training; batches {"input_ids": int64 [B, T], "labels": int64 [B, T]}, -100 ignored."""

    field = "input_ids"

    def __init__(self, *, model: nn.Module, optimizer: Optimizer, gradient_checkpointing: bool = False) -> None:
        super().__init__(model=model, optimizer=optimizer)
        if gradient_checkpointing:
            model.activation_checkpointing_enable()  # type: ignore[operator]
        self.validation_loss = MeanMetric().set_dtype(torch.float64)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross-entropy over the batch's tokens, in nats."""
        return token_losses(self.model, batch).mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the validation mean."""
        self.validation_loss.update(token_losses(self.model, batch))

    def on_validation_epoch_end(self) -> None:
        """Logs val/loss (nats per token) and val/perplexity."""
        loss = self.validation_loss.compute()
        self.log_dict({"val/loss": loss, "val/perplexity": loss.exp()}, logger=False)
        self.validation_loss.reset()

    def items(self, batch: Batch) -> int:
        """Tokens."""
        return batch["input_ids"].numel()


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """-log p of each target that is not ignored: float32 [targets], in nats."""
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float().flatten(0, 1)
    target = batch["labels"][:, 1:].flatten()
    kept = target != -100
    return nn.functional.cross_entropy(logits, target, reduction="none")[kept]
