"""The clip ratio of each block that gives the least squared error, tried out on the grid as it will be stored."""

import torch
from torch import Tensor

from qat.affine import QParams, block_range, qparams_from_range, store_offset, store_scale
from qat.errors import UserError, at_least
from qat.kernels.chunks import Grid, chunks, scratch
from qat.scheme import QuantSpec


@torch.no_grad()
def search(tensor: Tensor, spec: QuantSpec, *, lowest: float = 0.3, steps: int = 36) -> QParams:
    """tensor (R, C) -> the grid whose range, shrunk by one of `steps` ratios from 1 down to `lowest`, errs least.

    Never worse than round-to-nearest, whose ratio is 1, in any block. The range shrinks towards zero, or towards its
    middle where the offset is floating. Errors are measured in float32 on values with the stored scale. Raises
    ValueError if the block does not divide the shape.
    """
    at_least("steps", steps, 1)
    if not 0 < lowest <= 1:
        raise UserError(f"lowest={lowest} is not possible; give a ratio above 0 and at most 1")
    x = tensor.float()
    low, high = block_range(x, spec)
    middle = (low + high) / 2 if spec.offset not in (None, "zero_point") else torch.zeros_like(low)
    best: QParams | None = None
    least = torch.zeros_like(low)
    for i in range(steps):
        ratio = 1 - (1 - lowest) * i / max(1, steps - 1)
        grid = qparams_from_range(middle + (low - middle) * ratio, middle + (high - middle) * ratio, spec)
        error = _errors(x, grid, spec)
        if best is None:
            best, least = grid, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = QParams(*(None if a is None else torch.where(better, b, a) for a, b in zip(best, grid, strict=True)))  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert best is not None
    if isinstance(spec.scale, str) and (spec.offset is None or isinstance(spec.offset, str)):
        return best
    # each block chose for itself: bring them back onto the grid that neighbours share
    assert spec.offset is not None or best.offset is None
    offset = None if best.offset is None or spec.offset is None else store_offset(best.offset, spec.offset)
    return QParams(store_scale(best.scale, spec.scale), offset)


def _errors(x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
    """Sum of squared errors of each block, (R/r, C/c)."""
    grid = Grid(qparams, spec)
    out = torch.zeros_like(grid.scale)
    for c in chunks(x, spec):
        y = grid.quotients(c, x, scratch("piece", c.of(x), torch.float32))
        error = grid.values_(c, grid.steps(c, y, y)).sub_(c.tiled(x)).square_()
        c.scales(out)[..., 0, 0].add_(error.sum((-1, -2)))
    return out
