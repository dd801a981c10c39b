"""A whole fake-quantized linear layer as one autograd function that saves only its input and its weight.

Forward: the fake-quantized weight is written into a buffer that all layers share, then one matrix product. Backward:
the buffer is filled again, from the same scales. Values equal `F.linear(x, quantizer(weight), bias)` bit for bit, and
a step needs no more memory than the float layer's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.affine import QParams, tile
from qat.kernels.chunks import Grid, chunks, fake_quantized, scratch, work
from qat.quantizers.base import FakeQuantize


class _FakeLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, quantizer: FakeQuantize, transposed: bool, *grid: Any
    ) -> Tensor:
        w = weight.t() if transposed else weight
        ctx.quantizer, ctx.transposed = quantizer, transposed
        ctx.save_for_backward(x, weight, *grid)
        return F.linear(x, fake_quantized(w, QParams(*grid), quantizer.spec, x.dtype, quantizer.covers), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *saved = ctx.saved_tensors
        quantizer: FakeQuantize = ctx.quantizer
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        need_s, need_o = ctx.needs_input_grad[5:7]
        g2, x2 = grads[0].reshape(-1, grads[0].shape[-1]), x.reshape(-1, x.shape[-1])
        gx = gw = gs = go = None
        if need_w or need_s or need_o:  # in the order in which the weight is stored
            gw = (x2.t() @ g2 if ctx.transposed else g2.t() @ x2).to(weight.dtype)
        if need_x or need_s or need_o or (need_w and not quantizer.covers):
            w = weight.t() if ctx.transposed else weight
            v = gw.t() if ctx.transposed and gw is not None else gw
            q, gs, go = _again(w, v, QParams(*saved), quantizer, x.dtype, need_s, need_o)
            gx = (g2 @ q).view(x.shape) if need_x else None
        gb = g2.sum(0) if need_b else None
        return gx, gw if need_w else None, gb, None, None, gs, go, None, None


def _again(
    w: Tensor,
    gw: Tensor | None,
    qparams: QParams,
    quantizer: FakeQuantize,
    dtype: torch.dtype,
    scale: bool,
    offset: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The fake-quantized weight once more; on the way gw is set to zero beyond the edge, and the gradients of the
    scale and a floating offset are summed, if they are needed (the formulas of `fake_quantize`)."""
    if gw is None or (quantizer.covers and not scale and not offset):
        return fake_quantized(w, qparams, quantizer.spec, dtype, quantizer.covers), None, None
    grid = Grid(qparams, quantizer.spec)
    out = scratch("weight", w, dtype)
    gs = torch.zeros_like(grid.scale) if scale else None
    go = torch.zeros_like(grid.scale) if offset else None
    exact = qparams.exact_scale is not None
    for c in chunks(w, quantizer.spec):
        piece = work(c, w, out)
        g = c.tiled(gw)
        y = grid.quotients(c, w, piece)
        low, high = grid.bounds(c)
        # 1.0 where y lies within the edge, else 0.0: passes over booleans take five times as long
        inside = tile(scratch("inside", piece, torch.float32), c.block)
        torch.clamp(y, low - quantizer.edge, high + quantizer.edge, out=inside)  # pyright: ignore[reportArgumentType, reportCallIssue]
        torch.eq(y, inside, out=inside)
        if go is not None:
            c.scales(go)[..., 0, 0].add_((g.float() if exact else g * (1.0 - inside)).sum((-1, -2)))
        steps = grid.steps(c, y, y if gs is None else tile(scratch("steps", piece, torch.float32), c.block))
        if gs is not None:  # y is not needed again: its memory takes the terms of the sum
            terms = steps if exact else torch.sub(steps, y.mul_(inside), out=y)
            c.scales(gs)[..., 0, 0].add_(torch.mul(g, terms, out=y).sum((-1, -2)))
        g.mul_(inside)
        grid.values_(c, steps)
        if gs is not None or dtype != torch.float32:
            c.tiled(out).copy_(steps)
    return out, gs, go


def fake_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, quantizer: FakeQuantize | None, transposed: bool = False
) -> Tensor:
    """F.linear(x (..., C), quantizer(weight), bias) -> (..., R).

    weight: (R, C), or (C, R) if transposed (GPT-2's Conv1D), the parameter itself. Under autocast the fake-quantized
    weight is computed in float32 and cast last. Falls back to the plain expression under torch.compile, which fuses
    it better, and for a quantizer that is off.
    """
    w = weight.t() if transposed else weight
    if quantizer is None or not quantizer.enabled:
        return F.linear(x, w, bias)
    if torch.compiler.is_compiling() or type(quantizer).forward is not FakeQuantize.forward:
        return F.linear(x, quantizer(w), bias)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if dtype is None and x.dtype != weight.dtype:
        return F.linear(x, quantizer(w), bias)  # torch's own error names the dtypes
    qparams = quantizer.qparams(w)
    with torch.autocast(device, enabled=False):
        if dtype is not None:
            x, bias = x.to(dtype), bias if bias is None else bias.to(dtype)
        out: Tensor = _FakeLinear.apply(x, weight, bias, quantizer, transposed, *qparams)  # pyright: ignore[reportAssignmentType]
    return out
