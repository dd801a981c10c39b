"""checkpoints/last.ckpt and best.ckpt, written atomically, with every random state a resumed run needs."""

import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn

from qat.errors import UserError
from qat.files import atomic_file


class Checkpoints(pl.Callback):
    """last.ckpt every `every_n_steps` optimiser steps and after each validation, best.ckpt at the lowest val/loss.

    Validations before `best_from_step` (while fake-quant is delayed) do not compete: they measure another model.
    Where a validation follows a step (every `validate_every` steps) last.ckpt waits for it, since Lightning does not
    repeat it on resume: else a kill in between would lose its verdict on the best weights.
    """

    def __init__(self, folder: Path, every_n_steps: int, validate_every: int, best_from_step: int = 0) -> None:
        self.folder, self.every_n_steps, self.best_from_step = folder, every_n_steps, best_from_step
        self.validate_every = validate_every
        self.best: float | None = None
        self.saved_at, self.validated_at = -1, -1

    @property
    def last_path(self) -> Path:
        """Where a resumed run starts from."""
        return self.folder / "last.ckpt"

    @property
    def best_path(self) -> Path:
        """The weights with the lowest validation loss."""
        return self.folder / "best.ckpt"

    def state_dict(self) -> dict[str, Any]:
        """The best loss so far, and the step of the latest validation."""
        return {"best": self.best, "validated_at": self.validated_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved."""
        self.best, self.validated_at = state_dict["best"], state_dict["validated_at"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after the optimiser step, not after each of its accumulated batches."""
        step = trainer.global_step
        if step == self.saved_at or (trainer.enable_validation and step % self.validate_every == 0):
            return
        if step % self.every_n_steps == 0 or step == trainer.max_steps:
            self.saved_at = step
            self._save(trainer, self.last_path)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what is better than before, and where to go on from."""
        loss, step = float(trainer.callback_metrics["val/loss"]), trainer.global_step
        self.validated_at = step
        if step > self.best_from_step and (self.best is None or loss < self.best):
            self.best = loss
            self._save(trainer, self.best_path, weights_only=True)
        if trainer.state.fn == TrainerFn.FITTING:
            self._save(trainer, self.last_path)

    def _save(self, trainer: pl.Trainer, path: Path, weights_only: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            trainer.save_checkpoint(temporary, weights_only=weights_only)


def refuse_fewer_steps(folder: Path, max_steps: int) -> None:
    """Raise UserError if a last.ckpt under `folder` is further than `max_steps`, or damaged."""
    for path in sorted(folder.rglob("last.ckpt")):
        refuse_damaged(path)
        step = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
        if step > max_steps:
            raise UserError(
                f"trainer.max_steps={max_steps} is behind {path}, which is at step {step}: give {step} or more, "
                "or start a new run"
            )


def refuse_damaged(path: Path) -> None:
    """Raise UserError unless the checkpoint, a zip file with a CRC for every tensor, is whole."""
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
    except zipfile.BadZipFile as error:
        bad = str(error)
    if bad:
        raise UserError(f"{path} is damaged ({bad}): restore a copy of it, or remove it to train this arm anew")


class RandomState(pl.Callback):
    """Carries the states of python, numpy, torch and CUDA through a checkpoint (dropout needs them)."""

    def __init__(self) -> None:
        self.loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Only types that torch.load(weights_only=True) reads."""
        kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        return {
            "python": random.getstate(),
            "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the first batch: set-up work in between may draw random numbers."""
        self.loaded = state_dict

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put the states back, once."""
        if self.loaded is None:
            return
        random.setstate(self.loaded["python"])
        kind, keys, position, has_gauss, cached = self.loaded["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
        torch.set_rng_state(self.loaded["torch"])
        if self.loaded["cuda"]:
            torch.cuda.set_rng_state_all(self.loaded["cuda"])
        self.loaded = None
