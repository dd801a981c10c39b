"""An exact histogram of a stream, in bounded memory. Bins are [k, k+1) * 2**e, so a wider range merges whole bins.

No count is ever split or guessed: the histogram of a stream is that of all its values at once, bit for bit, however
they were cut into batches. Observers that choose a range from a histogram (percentile, MSE, entropy) build on it.
"""

import math

import torch
from torch import Tensor

from qat.errors import UserError
from qat.observers.base import Observer
from qat.scheme import QuantSpec

FINEST = -149  # the exponent of float32's smallest number: no finer bin can hold anything
DIGITS = 24  # float32's significant bits: finer bins than max|x| / 2**24 would tell nothing more


def bin_exponent(low: float, high: float, bins: int) -> int:
    """The smallest e for which low..high touches at most `bins` (2 or more) bins of width 2**e."""
    largest = max(abs(low), abs(high))
    if largest == 0:
        return FINEST
    e = max(math.frexp(largest)[1] - DIGITS, FINEST)
    if high > low:
        e = max(e, math.frexp((high - low) / bins)[1] - 1)
    while _bin(high, e) - _bin(low, e) >= bins:
        e += 1
    return e


def _bin(x: float, e: int) -> int:
    return math.floor(math.ldexp(x, -e))


class Histogram(Observer):
    """counts: int64 [bins], bin i being [start + i, start + i + 1) * 2**exponent; low, high: the extremes, float32.

    Between half of the bins and all of them cover low..high. Raises UserError for fewer than 2 bins.
    """

    def __init__(self, *, bins: int = 2048) -> None:
        super().__init__()
        if bins < 2:
            raise UserError(f"a histogram of {bins} bins cannot hold both signs; give 2 or more")
        self.bins = bins
        self.counts: Tensor
        self.start: Tensor
        self.exponent: Tensor
        self.low: Tensor
        self.high: Tensor
        self.register_buffer("counts", torch.zeros(bins, dtype=torch.int64))
        self.register_buffer("start", torch.tensor(0))
        self.register_buffer("exponent", torch.tensor(FINEST))
        self.register_buffer("low", torch.tensor(torch.inf))
        self.register_buffer("high", torch.tensor(-torch.inf))

    def update(self, x: Tensor) -> None:
        x = x.detach().float().flatten()
        low, high = x.aminmax()
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))
        e = bin_exponent(float(self.low), float(self.high), self.bins)
        start = _bin(float(self.low), e)
        self._move(e, start)
        where = (x.double() * 2.0**-e).floor().long() - start  # a power of two: the product is exact
        self.counts += torch.bincount(where, minlength=self.bins)

    def _move(self, e: int, start: int) -> None:
        """Bring the counts to another (never finer) bin width and first bin."""
        filled = self.counts.nonzero().squeeze(1)
        shift = min(e - int(self.exponent), 62)
        where = ((filled + self.start) >> shift) - start  # halving an index rounds down, as bins nest
        self.counts.copy_(torch.zeros_like(self.counts).index_add_(0, where, self.counts[filled]))
        self.exponent.fill_(e)
        self.start.fill_(start)

    def filled(self) -> tuple[Tensor, Tensor]:
        """(k, n): indices of the non-empty bins, as multiples of the width 2**exponent, ascending; their counts."""
        where = self.counts.nonzero().squeeze(1)
        return where + self.start, self.counts[where]

    def magnitudes(self) -> tuple[Tensor, Tensor]:
        """As `filled`, for |x|: bin k covers [k, k+1) * 2**exponent of it (negative edges belong to the bin below)."""
        k, n = self.filled()
        k, order = torch.where(k < 0, -k - 1, k).sort(stable=True)
        k, inverse = k.unique_consecutive(return_inverse=True)
        return k, torch.zeros_like(k).index_add_(0, inverse, n[order])

    @property
    def width(self) -> float:
        return 2.0 ** int(self.exponent)

    def clip(self, threshold: Tensor | float) -> tuple[Tensor, Tensor]:
        """The part of low..high whose magnitude is at most `threshold`."""
        return self.low.clamp(min=-threshold), self.high.clamp(max=threshold)

    def range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return self.low, self.high
