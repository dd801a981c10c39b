"""metrics.csv of a run: one row per logged step, continued when the run is resumed."""

import csv
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger

from qat.errors import disk_errors
from qat.files import atomic_file
from qat.training.base import Task

Row = dict[str, str]


class CsvMetrics(Logger):
    """Appends rows to `path`, each marked with its arm (qat, control); those already there stay.

    Lightning's own CSV logger would delete the rows of the run that is being resumed.
    """

    def __init__(self, path: Path, arm: str) -> None:
        super().__init__()
        self.path, self.arm = path, arm
        self.columns: list[str] = []
        if path.exists():
            self._read()

    @property
    def name(self) -> str:
        """Name for Lightning."""
        return "csv"

    @property
    def version(self) -> str:
        """Version for Lightning."""
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add to the row of `step`; a metric not seen before adds a column."""
        row = {"step": str(step), "arm": self.arm, **{name: f"{value:.6g}" for name, value in metrics.items()}}
        new = [name for name in row if name not in self.columns]
        if new:
            rows = self._read() if self.path.exists() else []
            self.columns += new
            self._rewrite([*rows, row])
        else:
            with disk_errors(self.path), self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)

    def rewind(self, step: int) -> None:
        """Forget this arm's rows after `step`: a resumed run writes them again."""
        if self.path.exists():
            self._rewrite([row for row in self._read() if row["arm"] != self.arm or int(row["step"]) <= step])

    def forget_validation(self, step: int) -> None:
        """Drop this arm's validation at `step`, which is measured again."""
        if self.path.exists():
            self._rewrite([row for row in self._read() if not self._validates(row, step)])

    def _validates(self, row: Row, step: int) -> bool:
        here = row["arm"] == self.arm and row["step"] == str(step)
        return here and any(value for name, value in row.items() if name.startswith("val/"))

    def _read(self) -> list[Row]:
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            self.columns = list(reader.fieldnames or [])
            # a kill in mid-write can leave a torn last line
            return [row for row in reader if None not in row.values() and row["step"].isdigit()]

    def _rewrite(self, rows: list[Row]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)


class LogMetrics(pl.Callback):
    """Every `every_n_steps` optimiser steps: mean training loss since the last row, rate, gradient norm, speed."""

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.losses: list[torch.Tensor] = []
        self.items, self.logged, self.since = 0, 0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """Drop what an interrupted run wrote after its last checkpoint."""
        self.since, self.logged = time.perf_counter(), trainer.global_step
        for logger in trainer.loggers:
            if isinstance(logger, CsvMetrics):
                logger.rewind(trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One row per `every_n_steps`."""
        self.losses.append(outputs["loss"].detach())
        self.items += pl_module.items(batch)
        if trainer.global_step % self.every_n_steps or trainer.global_step == self.logged:
            return
        now = time.perf_counter()
        mean = torch.stack(self.losses).float().mean().item() * trainer.accumulate_grad_batches
        row = {
            "train/loss": mean,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "grad_norm": pl_module.grad_norm.item(),
            "items_per_second": self.items / (now - self.since),
        }
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)
        self.losses, self.items, self.since, self.logged = [], 0, now, trainer.global_step

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """The validation metrics as a row of their own."""
        row = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)
        self.since = time.perf_counter()  # evaluation is not training time
