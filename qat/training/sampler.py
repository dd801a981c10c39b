"""Batches by step number: where training goes on is a function of the step, so nothing need be replayed."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class StepSampler(Sampler[list[int]]):
    """Endless batches of indices [batch_size]; the n-th batch depends on (length, batch_size, seed, n) alone.

    The stream is the concatenation of epochs, epoch e being a permutation of range(length) drawn with seed + e,
    so a batch may straddle two epochs and each item is seen once per epoch. `start` counts batches already done.
    There is no length: max_steps ends a run, not the data.
    """

    def __init__(self, length: int, batch_size: int, seed: int, start: int = 0) -> None:
        self.length, self.batch_size, self.seed, self.start = length, batch_size, seed, start

    def __iter__(self) -> Iterator[list[int]]:
        epoch, offset = divmod(self.start * self.batch_size, self.length)
        order = self._epoch(epoch)
        while True:
            batch: list[int] = []
            while len(batch) < self.batch_size:
                if offset == self.length:
                    epoch, offset = epoch + 1, 0
                    order = self._epoch(epoch)
                part = order[offset : offset + self.batch_size - len(batch)]
                batch += part
                offset += len(part)
            yield batch

    def _epoch(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(self.length, generator=generator).tolist()
