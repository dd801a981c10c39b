"""The Lightning module for any causal language model of transformers, and its evaluation in nats per token."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torchmetrics import MeanMetric

from qat.training.optim import Optimizer

Batch = dict[str, torch.Tensor]


class CausalLM(pl.LightningModule):
    """Next-token training of `model`; batches {"input_ids": int64 [B, T], "labels": int64 [B, T]}, -100 ignored."""

    metric = "perplexity"

    def __init__(self, *, model: nn.Module, optimizer: Optimizer, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.model, self.optimizer = model, optimizer
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        self.validation_loss = MeanMetric().set_dtype(torch.float64)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Mean cross-entropy over the batch's tokens, in nats."""
        return self.model(**batch, use_cache=False).loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the validation mean, weighted by its tokens."""
        loss = self.model(**batch, use_cache=False).loss
        self.validation_loss.update(loss, (batch["labels"][:, 1:] != -100).sum())

    def on_validation_epoch_end(self) -> None:
        """Logs val/loss (nats per token) and val/perplexity."""
        loss = self.validation_loss.compute()
        self.log_dict({"val/loss": loss, "val/perplexity": loss.exp()}, logger=False)
        self.validation_loss.reset()

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW and its schedule over the trainer's max_steps."""
        return self.optimizer.build(self.model, self.trainer.max_steps)

    @staticmethod
    def items(batch: Batch) -> int:
        """What speed is counted in: tokens."""
        return batch["input_ids"].numel()


@torch.no_grad()
def evaluate(model: nn.Module, batch: Batch, *, batch_size: int = 8) -> dict[str, float]:
    """{"loss", "perplexity"} in nats per token of a causal LM over windows [n, T], in the model's own dtype.

    The same sum for every stage: log-softmax in fp32, mean in fp64, ignored labels (-100) left out.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    total, count = 0.0, 0
    for ids, labels in zip(batch["input_ids"].split(batch_size), batch["labels"].split(batch_size), strict=True):
        logits = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].float()
        target = labels[:, 1:].to(device)
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        total += losses.double().sum().item()
        count += int((target != -100).sum())
    model.train(training)
    loss = total / count
    return {"loss": loss, "perplexity": float(torch.tensor(loss, dtype=torch.float64).exp())}
