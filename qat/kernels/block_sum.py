"""What a runtime's rounded block sums add to a linear layer whose weights have a floating offset (ggml Q4_1 × Q8_1).

x·W = Σ scale_w scale_x Σ code_w code_x + Σ offset_w · s, where s should be scale_x Σ code_x but is kept as the
rounding of (unrounded scale_x) Σ code_x. Source: ggml-quants.c, `quantize_row_q8_1` and `ggml_vec_dot_q4_1_q8_1`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.affine import QParams, choose_qparams, store_offset, to_codes
from qat.scheme import QuantSpec


@torch.no_grad()
def sum_error(rows: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
    """rows (T, C) and their grid -> kept sum less exact sum of each block, (T, C/c) float32."""
    assert spec.block_sum is not None
    sums = to_codes(rows, qparams, spec).sum((-1, -2))
    top = torch.full_like(sums, spec.type.qmax)
    assert qparams.exact_scale is not None
    largest = rows.float().unflatten(-1, (sums.shape[1], -1)).abs().amax(-1)
    return store_offset(largest / top * sums, spec.block_sum).float() - qparams.scale.float() * sums


@torch.no_grad()
def _correction(x: Tensor, spec: QuantSpec, offset: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return F.linear(sum_error(rows, choose_qparams(rows, spec), spec), offset.float())


def with_block_sums(out: Tensor, x: Tensor, spec: QuantSpec, offset: Tensor | None) -> Tensor:
    """out (..., R) of a linear layer, corrected for the runtime's sums; a constant to the gradient.

    x (..., C): the layer's float input. spec: how it is quantized. offset (R, C/c): that of the weight, if any.
    """
    if offset is None:
        return out
    return out + _correction(x, spec, offset).reshape(out.shape).to(out.dtype)
