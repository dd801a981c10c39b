"""The range with the smallest expected squared error of the very grid that will be used, over the histogram."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from qat.affine import qparams_from_range
from qat.fake_quantize import fake_quantize
from qat.observers.histogram import Histogram
from qat.scheme import QuantSpec

STEPS = 64  # candidates of a line search
SIDE = 12  # candidates for each end in the search around the best of the lines
ZOOM = (4 / STEPS, 1 / STEPS, 0.2 / STEPS)  # how far around it, as a share of the range
Ends = tuple[Tensor, Tensor]


class MSEObserver(Histogram):
    """Symmetric grids: a line search over the clipping threshold. Others: over both ends together and each alone,
    twice, as one end's best place depends on the other's. Then ever closer around the best.

    Every candidate's error comes from `fake_quantize` with its own stored scale and zero point. The whole range
    is a candidate, so the result is never worse than min-max. A search takes tens of milliseconds: calibrate, then
    freeze, rather than let it run at every training step.
    """

    def range(self, spec: QuantSpec) -> Ends:
        low, high = self.low.clone(), self.high.clone()
        if low == high:
            return low, high
        if spec.offset == "zero_point":  # such a grid holds zero anyway
            low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        k, n = self.filled()
        x = ((k + 0.5) * self.width).float().clamp(self.low, self.high)
        best = expected_error(x, n, low[None], high[None], spec)[0]
        lines = (_threshold,) if spec.offset is None else (_both, _high, _low, _high, _low)
        least, most = low, high
        for search in [partial(line, least, most) for line in lines] + [partial(_around, zoom) for zoom in ZOOM]:
            lows, highs = search(low, high)
            if spec.offset == "zero_point":
                lows, highs = lows.clamp(max=0.0), highs.clamp(min=0.0)
            errors = expected_error(x, n, lows, highs, spec)
            i = errors.argmin()
            if errors[i] < best:
                best, low, high = errors[i], lows[i], highs[i]
        return low, high


# Candidates ([c], [c]) between the extremes `least` and `most`, given the best range so far.


def _steps(like: Tensor) -> Tensor:
    return torch.arange(1, STEPS + 1, device=like.device) / STEPS


def _threshold(least: Tensor, most: Tensor, low: Tensor, high: Tensor) -> Ends:
    t = torch.maximum(most, -least) * _steps(low)
    return torch.maximum(least, -t), torch.minimum(most, t)


def _both(least: Tensor, most: Tensor, low: Tensor, high: Tensor) -> Ends:
    centre = torch.zeros_like(low).clamp(least, most)  # 0, or what is nearest to it
    return centre + (least - centre) * _steps(low), centre + (most - centre) * _steps(low)


def _high(least: Tensor, most: Tensor, low: Tensor, high: Tensor) -> Ends:
    return low.expand(STEPS), low + (most - low) * _steps(low)


def _low(least: Tensor, most: Tensor, low: Tensor, high: Tensor) -> Ends:
    return high - (high - least) * _steps(low), high.expand(STEPS)


def _around(zoom: float, low: Tensor, high: Tensor) -> Ends:
    f = torch.linspace(-zoom, zoom, SIDE, device=low.device) * (high - low)
    lows, highs = torch.meshgrid(low + f, high + f, indexing="ij")
    return lows.flatten(), highs.flatten()


def expected_error(x: Tensor, n: Tensor, lows: Tensor, highs: Tensor, spec: QuantSpec) -> Tensor:
    """Sum of squared errors, float64 [c], of n[i] values at x[i] under the grids of ranges lows..highs [c]."""
    row = replace(spec, block=(1, -1))  # one candidate a row
    rows = x.expand(len(lows), -1)
    error = fake_quantize(rows, qparams_from_range(lows[:, None], highs[:, None], row), row) - rows
    return (error.double().square() * n).sum(1)
