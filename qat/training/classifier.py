"""Training of any classifier: images or features in, one logit per class out."""

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from qat.training.base import Task
from qat.training.optim import Optimizer

Batch = dict[str, Tensor]


class Classifier(Task):
    """Cross-entropy training; batches {"x": float32 [B, ...], "labels": int64 [B]}, model(x) gives logits [B, C]."""

    field = "x"

    def __init__(self, *, model: nn.Module, optimizer: Optimizer, num_classes: int) -> None:
        super().__init__(model=model, optimizer=optimizer)
        self.validation_loss = MeanMetric().set_dtype(torch.float64)
        self.validation_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross-entropy of the batch, in nats."""
        return nn.functional.cross_entropy(self.model(batch["x"]).float(), batch["labels"])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the validation means."""
        logits = self.model(batch["x"]).float()
        self.validation_loss.update(nn.functional.cross_entropy(logits, batch["labels"], reduction="none"))
        self.validation_accuracy.update(logits, batch["labels"])

    def on_validation_epoch_end(self) -> None:
        """Logs val/loss (nats) and val/accuracy (share of 1)."""
        self.log_dict(
            {"val/loss": self.validation_loss.compute(), "val/accuracy": self.validation_accuracy.compute()},
            logger=False,
        )
        self.validation_loss.reset()
        self.validation_accuracy.reset()

    def items(self, batch: Batch) -> int:
        """Images."""
        return len(batch["labels"])
