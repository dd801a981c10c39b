"""When fake-quant starts and when observers stop: both follow from the step alone, so a resume agrees."""

from typing import Any

import pytorch_lightning as pl

from qat import conversion


class QuantSchedule(pl.Callback):
    """Fake-quant from `quant_start_step` on; observers frozen from `observer_freeze_step` on (None = never)."""

    def __init__(self, quant_start_step: int, observer_freeze_step: int | None = None) -> None:
        self.quant_start_step, self.observer_freeze_step = quant_start_step, observer_freeze_step
        self.enabled: bool | None = None
        self.frozen = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Switch at the step, and once at the start of a resumed run."""
        enabled = trainer.global_step >= self.quant_start_step
        if enabled != self.enabled:
            conversion.set_fake_quant(pl_module, enabled)
            self.enabled = enabled
        if not self.frozen and self.observer_freeze_step is not None:
            self.frozen = trainer.global_step >= self.observer_freeze_step
            if self.frozen:
                conversion.freeze_observers(pl_module)
