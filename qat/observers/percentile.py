"""The range that holds a given percentage of the values; the rest is clipped."""

import torch
from torch import Tensor

from qat.errors import UserError
from qat.observers.histogram import Histogram
from qat.scheme import QuantSpec


class PercentileObserver(Histogram):
    """percentile: of the values, how many stay inside: of |x| for a symmetric grid, else half of the rest is cut from
    each end. Read from the histogram, so exact to one bin's width. Where nearly all values are one and the same
    (a rarely active layer) that range is empty, and the whole range is taken instead.

    Raises UserError unless 50 < percentile <= 100.
    """

    def __init__(self, *, percentile: float = 99.99, bins: int = 2048) -> None:
        super().__init__(bins=bins)
        if not 50 < percentile <= 100:
            raise UserError(f"percentile is {percentile}; it must be above 50 and at most 100, such as 99.99")
        self.percentile = percentile

    def range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        share = self.percentile / 100
        if spec.offset is None:
            threshold = self._quantile(*self.magnitudes(), share)
            low, high = self.clip(threshold.float())
            empty = threshold < self.width  # still in the bin of zero
        else:
            k, n = self.filled()
            ends = [self._quantile(k, n, q) for q in ((1 - share) / 2, (1 + share) / 2)]
            low, high = (e.float().clamp(self.low, self.high) for e in ends)
            empty = ends[1] - ends[0] < self.width
        return (self.low, self.high) if self.percentile == 100 or empty else (low, high)

    def _quantile(self, k: Tensor, n: Tensor, q: float) -> Tensor:
        """numpy's "linear" percentile, each bin's values taken as spread evenly over it; 0-d float64."""
        ends = n.cumsum(0)
        rank = q * (int(ends[-1]) - 1)
        below = torch.tensor([int(rank), min(int(rank) + 1, int(ends[-1]) - 1)], device=k.device)
        where = torch.searchsorted(ends, below, right=True)
        inside = (below - (ends - n)[where] + 0.5) / n[where].double()
        values = (k[where] + inside) * self.width
        return values[0] + (rank - int(rank)) * (values[1] - values[0])
