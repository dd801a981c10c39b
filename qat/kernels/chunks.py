"""Fake-quantization of a large weight piece by piece, in place and in cache, into a buffer that is used again.

A fresh tensor costs more in page faults than its arithmetic; a piece of about half a megabyte stays in the second
level cache through all of its steps. Every value equals `fake_quantize`'s.
"""

import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qat.affine import QParams, tile
from qat.rounding import round_
from qat.scheme import Block, QuantSpec, check_block

ELEMENTS = 131072  # half a megabyte of float32, for each thread
_scratch = threading.local()


class Chunk(NamedTuple):
    """A piece of (R, C): its rows and columns, the same of its scales, and its blocks, cut where the piece ends."""

    rows: slice
    cols: slice
    scale_rows: slice
    scale_cols: slice
    block: Block

    def of(self, w: Tensor) -> Tensor:
        return w[self.rows, self.cols]

    def tiled(self, w: Tensor) -> Tensor:
        return tile(w[self.rows, self.cols], self.block)

    def scales(self, s: Tensor) -> Tensor:
        """(R/r, C/c) -> this piece's, shaped to broadcast over its tiles."""
        return s[self.scale_rows, self.scale_cols, None, None]


def chunks(w: Tensor, spec: QuantSpec) -> Iterator[Chunk]:
    """Pieces of w (R, C) along the dimension that is outermost in memory. On a GPU, one piece."""
    block = check_block((w.shape[0], w.shape[1]), spec.block)
    dim = 0 if w.stride(0) >= w.stride(1) else 1
    size, unit = w.shape[dim], block[dim]
    whole = unit == size  # one block along this dimension: it may be cut anywhere, all pieces share its scale
    step = size if w.is_cuda else max(1, ELEMENTS * torch.get_num_threads() // max(1, w.shape[1 - dim]))
    step = step if whole else max(unit, step // unit * unit)
    every = slice(None)
    for start in range(0, size, step):
        stop = min(start + step, size)
        piece = slice(start, stop)
        scale = slice(0, 1) if whole else slice(start // unit, stop // unit)
        if dim == 0:
            yield Chunk(piece, every, scale, every, (min(unit, stop - start), block[1]))
        else:
            yield Chunk(every, piece, every, scale, (block[0], min(unit, stop - start)))


class Grid:
    """QParams in float32, ready to be applied to pieces."""

    def __init__(self, qparams: QParams, spec: QuantSpec) -> None:
        self.spec = spec
        self.scale = qparams.scale.float()
        divisor = self.scale if qparams.exact_scale is None else qparams.exact_scale
        self.product = spec.divide.endswith("inverse") or spec.divide.startswith("reciprocal")
        self.divisor = 1.0 / divisor if spec.divide.endswith("inverse") else divisor
        self.zero = self.shift = self.offset = None
        if qparams.offset is not None:
            if spec.offset == "zero_point":
                self.zero = qparams.offset.float()
            else:
                self.offset = qparams.offset.float()
                self.shift = self.offset if qparams.exact_offset is None else qparams.exact_offset.float()

    def bounds(self, c: Chunk) -> tuple[Tensor | float, Tensor | float]:
        q = self.spec.type
        if self.zero is None:
            return q.qmin, q.qmax
        zero = c.scales(self.zero)
        return q.qmin - zero, q.qmax - zero

    def quotients(self, c: Chunk, w: Tensor, out: Tensor) -> Tensor:
        """What is rounded, written to the piece `out` (float32), returned tiled."""
        x, y = c.tiled(w), tile(out, c.block)
        if self.shift is not None:
            torch.sub(x, c.scales(self.shift), out=y)
            x = y
        (torch.mul if self.product else torch.div)(x, c.scales(self.divisor), out=y)
        return y

    def steps(self, c: Chunk, y: Tensor, out: Tensor) -> Tensor:
        """Clamp and round, into `out`, which may be y: codes less the zero point."""
        low, high = self.bounds(c)
        torch.clamp(y, low, high, out=out)  # pyright: ignore[reportArgumentType, reportCallIssue]
        return self.rounded_(out)

    def rounded_(self, y: Tensor) -> Tensor:
        return round_(y, self.spec.rounding, self.spec.type.qmin)

    def values_(self, c: Chunk, steps: Tensor) -> Tensor:
        steps.mul_(c.scales(self.scale))
        return steps if self.offset is None else steps.add_(c.scales(self.offset))


def scratch(name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor with the shape and strides of `like`, (R, C) dense. On a CPU the thread's own, kept
    and used again by the next caller: it is valid until then."""
    if like.device.type != "cpu":
        return torch.empty_like(like, dtype=dtype)
    key = f"{name}_{dtype}".replace(".", "_")
    buffer: Tensor | None = getattr(_scratch, key, None)
    if buffer is None or buffer.numel() < like.numel():
        with torch.inference_mode(False):
            buffer = torch.empty(like.numel(), dtype=dtype)
        setattr(_scratch, key, buffer)
    flat = buffer[: like.numel()]
    return flat.view(like.shape) if like.stride(0) >= like.stride(1) else flat.view(like.shape[::-1]).t()


@torch.no_grad()
def fake_quantized(w: Tensor, qparams: QParams, spec: QuantSpec, dtype: torch.dtype, covers: bool = False) -> Tensor:
    """w (R, C) -> its fake-quantized values in `dtype`, in a buffer that the next call on this thread overwrites.

    covers: every quotient is known to round to a code (see `FakeQuantize.covers`), so nothing needs clamping.
    """
    grid = Grid(qparams, spec)
    out = scratch("weight", w, dtype)
    for c in chunks(w, spec):
        piece = work(c, w, out)
        y = grid.quotients(c, w, piece)
        grid.values_(c, grid.rounded_(y) if covers else grid.steps(c, y, y))
        if dtype != torch.float32:
            c.of(out).copy_(piece)
    return out


def work(c: Chunk, w: Tensor, out: Tensor) -> Tensor:
    """Where a piece is computed in float32: in `out` itself, or beside it if that has another dtype."""
    return c.of(out) if out.dtype == torch.float32 else scratch("piece", c.of(w), torch.float32)
