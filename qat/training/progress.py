"""One progress line for training: step, time left, loss and speed; plain lines where there is no terminal."""

import time
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingBar(pl.Callback):
    """A rich bar on a terminal; elsewhere a line every `seconds` and at every validation."""

    def __init__(self, console: Console, title: str, seconds: float = 30.0) -> None:
        self.console, self.title, self.seconds = console, title, seconds
        self.progress: Progress | None = None
        self.items, self.first_step = 0, 0
        self.loss, self.since, self.said, self.drawn = 0.0, 0.0, 0.0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the bar at the step the run starts from."""
        self.since = self.said = time.monotonic()
        self.first_step = trainer.global_step
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            detail = TextColumn("{task.fields[detail]}")
            self.progress = Progress(*columns, TimeRemainingColumn(), detail, console=self.console, transient=True)
            self.task = self.progress.add_task(
                self.title, total=trainer.max_steps, completed=trainer.global_step, detail=""
            )
            self.progress.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance."""
        self.items += pl_module.items(batch)  # type: ignore[operator]
        now, step = time.monotonic(), trainer.global_step
        if now - self.drawn < 0.2:  # reading the loss waits for an accelerator
            return
        self.drawn = now
        loss = outputs["loss"].item() * trainer.accumulate_grad_batches
        self.loss = loss if not self.loss else 0.9 * self.loss + 0.1 * loss
        speed = f"loss {self.loss:.3f}, {self.items / (now - self.since):,.0f} items/s"
        if self.progress is not None:
            self.progress.update(self.task, completed=step, detail=speed)
        elif now - self.said > self.seconds and step > self.first_step:
            self.said = now
            left = (now - self.since) / (step - self.first_step) * (trainer.max_steps - step)
            self.console.print(f"{self.title}: step {step}/{trainer.max_steps}, {speed}, {left / 60:.1f} min left")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One line per validation."""
        values = ", ".join(f"{k} {float(v):.4f}" for k, v in trainer.callback_metrics.items() if k.startswith("val/"))
        self.console.print(f"{self.title}: step {trainer.global_step}, {values}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close."""
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close, so that the message is not drawn over."""
        self._stop()

    def _stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
