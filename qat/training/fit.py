"""One training arm, from a float or prepared model to trained weights; resumable at any step."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.seed import reset_seed
from pytorch_lightning.loggers.logger import Logger
from rich.console import Console
from torch import nn

from qat.errors import at_least
from qat.training.checkpoints import Checkpoints, RandomState, refuse_damaged
from qat.training.finite import StopOnNonFinite
from qat.training.limits import refuse_trainer
from qat.training.metrics import CsvMetrics, LogMetrics
from qat.training.optim import Optimizer
from qat.training.progress import TrainingBar


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """`evaluation=`: how often to validate while training, and what every stage is measured on."""

    every_n_steps: int
    split: Literal["train", "validation", "test"] = "test"
    windows: int | None = None

    def __post_init__(self) -> None:
        at_least("evaluation.every_n_steps", self.every_n_steps, 1)
        if self.windows is not None:
            at_least("evaluation.windows", self.windows, 1)


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """`checkpoint=`: how often last.ckpt is written, in optimiser steps."""

    every_n_steps: int

    def __post_init__(self) -> None:
        at_least("checkpoint.every_n_steps", self.every_n_steps, 1)


@dataclass(frozen=True)
class Fitted:
    """What a training arm reports: steps and items (tokens or images) seen in all, seconds per step of this run."""

    steps: int
    items: int
    step_seconds: float | None
    best_loss: float | None


def fit(
    model: nn.Module,
    *,
    arm: str,
    run_dir: Path,
    folder: Path,
    data: pl.LightningDataModule,
    task: Callable[..., pl.LightningModule],
    optimizer: Optimizer,
    trainer: partial[pl.Trainer],
    loggers: Sequence[Callable[..., Logger]],
    evaluation: Evaluation,
    checkpoint: Checkpointing,
    callbacks: list[pl.Callback],
    best_from_step: int,
    console: Console,
) -> Fitted:
    """Train `model` in place to trainer.max_steps and leave the weights with the lowest validation loss in it.

    Goes on from `folder`/last.ckpt if there is one. With max_steps=0 nothing happens.
    """
    refuse_trainer(trainer)
    if trainer.keywords["max_steps"] == 0:
        return Fitted(0, 0, None, None)
    reset_seed()  # a resumed run may have skipped an earlier arm, which drew random numbers
    model.train()  # from_pretrained leaves dropout off
    module = task(model=model, optimizer=optimizer)
    saver = Checkpoints(folder, checkpoint.every_n_steps, evaluation.every_n_steps, best_from_step)
    clock = StepClock()
    metrics = CsvMetrics(run_dir / "metrics.csv", arm)
    made = trainer(
        default_root_dir=run_dir,
        logger=[metrics, *(make(run_dir=run_dir, arm=arm) for make in loggers)],
        callbacks=[
            *callbacks,
            StopOnNonFinite(),
            LogMetrics(trainer.keywords["log_every_n_steps"]),
            TrainingBar(console, arm),
            clock,
            RandomState(),
            saver,
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=evaluation.every_n_steps * trainer.keywords.get("accumulate_grad_batches", 1),
        use_distributed_sampler=False,
    )
    start = saver.last_path if saver.last_path.exists() else None
    for path in (saver.last_path, saver.best_path):
        if path.exists():
            refuse_damaged(path)
    made.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
    if saver.validated_at != made.global_step:  # else the last steps could never be the best
        metrics.forget_validation(made.global_step)  # of a finished run that is resumed
        made.validate(module, datamodule=data, verbose=False)
    if saver.best_path.exists():
        state = torch.load(saver.best_path, map_location="cpu", weights_only=True)["state_dict"]
        module.load_state_dict(state)
    data.trainer = None  # its batches start at the first one again, for calibration and the next arm
    return Fitted(made.global_step, clock.items, clock.step_seconds, saver.best)


class StepClock(pl.Callback):
    """Items seen in all (through resumes), and seconds per optimiser step without validation."""

    def __init__(self) -> None:
        self.items, self.first_step, self.spent, self.since = 0, 0, 0.0, 0.0
        self.step_seconds: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"items": self.items}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved."""
        self.items = state_dict["items"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where this run starts from."""
        self.first_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        self.since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count and time."""
        self.spent += time.perf_counter() - self.since
        steps = trainer.global_step - self.first_step
        self.step_seconds = self.spent / steps if steps else None
        self.items += pl_module.items(batch)  # type: ignore[operator]
