"""The clipping threshold whose quantized distribution tells most about the original: least KL divergence.

TensorRT's calibration (S. Migacz, "8-bit Inference with TensorRT", GTC 2017) on the histogram of |x|.
"""

import torch
from torch import Tensor

from qat.errors import UserError
from qat.observers.histogram import Histogram
from qat.scheme import QuantSpec


class EntropyObserver(Histogram):
    """bins: of |x|, at most. For a threshold after i of them, P is those bins with everything beyond added to the last,
    and Q the same bins (nothing added) merged into as many levels as the grid has codes on one side of zero, each
    level spread evenly over its non-empty bins. The i with the least KL(P || Q) wins; no smoothing.

    Raises UserError for fewer than 2 bins.
    """

    def __init__(self, *, bins: int = 2048) -> None:
        super().__init__(bins=2 * bins)
        if bins < 2:
            raise UserError(f"the entropy search needs 2 bins or more, not {bins}")
        self.magnitude_bins = bins

    def range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        k, n = self.magnitudes()
        shift = max(int(k[-1]).bit_length() - (self.magnitude_bins - 1).bit_length(), 0)
        k = k >> shift
        counts = torch.zeros(int(k[-1]) + 1, dtype=torch.int64, device=k.device).index_add_(0, k, n)
        codes = spec.type.qmax - spec.type.qmin + 1
        one_sided = spec.offset is not None and not bool(self.low < 0 < self.high)
        levels = codes if one_sided else codes // 2
        divergence = kl_divergences(counts, levels)
        if not torch.isfinite(divergence).any():
            return self.low, self.high
        kept = levels + int(divergence.argmin())
        return self.clip(kept * self.width * 2**shift)


def kl_divergences(counts: Tensor, levels: int) -> Tensor:
    """KL(P || Q) in nats, float64, for thresholds after `levels`, levels + 1, ... len(counts) bins (counts int64 [b]).

    Level j takes bins [i * j // levels, i * (j+1) // levels). Computed from prefix sums: within a level log Q is one
    number, so only each level's sum and number of non-empty bins matter. Empty if there are fewer bins than levels.
    """
    h = counts.double()
    zero = torch.zeros(1, dtype=torch.float64, device=h.device)
    total, filled, plogp = (torch.cat([zero, v.cumsum(0)]) for v in (h, (h > 0).double(), torch.xlogy(h, h)))
    i = torch.arange(levels, max(len(h) + 1, levels), device=h.device)
    edges = i[:, None] * torch.arange(levels + 1, device=h.device) // levels
    mass, bins = total[edges].diff(), filled[edges].diff()
    inside, beyond, last = total[i], total[-1] - total[i], h[i - 1]
    log_q = torch.where(mass > 0, (mass / bins.clamp(min=1)).log(), 0.0)  # before normalisation by `inside`
    cross = (mass * log_q).sum(1) + torch.where(beyond > 0, beyond * log_q[:, -1], 0.0)
    p_log_p = plogp[i] - torch.xlogy(last, last) + torch.xlogy(last + beyond, last + beyond)
    divergence = (p_log_p - cross) / total[-1] - total[-1].log() + inside.log()
    return torch.where((beyond > 0) & (last == 0), torch.inf, divergence)
