"""Scikit-learn's bundled handwritten digits (UCI optdigits, 1797 images of 8 x 8): needs no network."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, StackDataset

from qat.errors import UserError
from qat.training.sampler import StepSampler

Batch = dict[str, Tensor]
SHARES = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}


class Digits(pl.LightningDataModule):
    """Batches {"x": float32 [B, 1, 8, 8] in 0..1, "labels": int64 [B]}.

    The 70/10/20 split is one fixed permutation, whatever the seed, so that figures of two runs are about the same
    images; `seed` orders the training batches. Raises UserError if scikit-learn is missing.
    """

    num_classes = 10

    def __init__(self, *, batch_size: int, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"data.batch_size={batch_size} is not possible; give a positive number")
        self.batch_size, self.seed = batch_size, seed
        self._all: Batch | None = None

    def reach(self) -> None:
        """The images are part of scikit-learn."""

    def attach(self, tokenizer: Any) -> None:
        """Images have no tokenizer."""

    def images(self, split: str) -> Batch:
        """All images of a split, in its fixed order."""
        if self._all is None:
            self._all = _load()
        count = len(self._all["labels"])
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        first, last = (round(share * count) for share in SHARES[split])
        return {name: tensor[order[first:last]] for name, tensor in self._all.items()}

    def evaluation(self, split: str = "test", n_windows: int | None = None) -> Batch:
        """The first `n_windows` images of a split (None: all)."""
        return {name: tensor[:n_windows] for name, tensor in self.images(split).items()}

    def describe(self) -> dict[str, Any]:
        """What the report says about the data."""
        splits: dict[str, Any] = {split: {"images": len(self.images(split)["labels"])} for split in SHARES}
        return {"name": "digits", "splits": splits}

    def train_dataloader(self) -> DataLoader[Batch]:
        """Endless shuffled batches that start where the trainer's step says, so that a resumed run sees the same."""
        images, position = self.images("train"), 0
        if self.trainer is not None:
            position = self.trainer.global_step * self.trainer.accumulate_grad_batches
        sampler = StepSampler(len(images["labels"]), self.batch_size, self.seed, position)
        return DataLoader(_rows(images), batch_sampler=sampler, generator=torch.Generator())  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation split in order."""
        return DataLoader(_rows(self.images("validation")), batch_size=self.batch_size, generator=torch.Generator())  # type: ignore[arg-type]


def _rows(images: Batch) -> Dataset[Batch]:
    return StackDataset(**images)  # type: ignore[return-value, arg-type]


def _load() -> Batch:
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise UserError("the digits come with scikit-learn, which is not installed: pip install scikit-learn") from e
    bunch: Any = load_digits()
    x = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)  # pixels are 0..16
    return {"x": x, "labels": torch.from_numpy(bunch.target).long()}
