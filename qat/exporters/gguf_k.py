"""ggml's Q4_K: 256 weights in 144 bytes, whose 8 scales and 8 minima are 6-bit codes of two float16 numbers.

Layout (ggml-common.h, ggml-quants.c): f16 d, f16 dmin, 12 bytes of 6-bit scales and minima, 128 bytes of nibbles.
A value is (d * sc) * code - (dmin * mn). All products of a float16 and a 6-bit code are exact in float32, so that is
how training and `Frozen` hold scales and offsets; here they are taken apart again, exactly.
"""

import numpy as np
import torch
from torch import Tensor

from qat.affine import QTensor
from qat.errors import UserError
from qat.scheme import QuantSpec

SUPER = QuantSpec(qtype="uint6", block=(1, 8), range="one_signed", scale="float16")  # of scales, and of offsets


def factors(values: Tensor) -> tuple[Tensor, Tensor]:
    """Products [N, B] (float32, one sign within 8) -> (codes uint8 [N, B], float16 factors [N, B/8]), exactly.

    Of several factorisations the one with the largest codes is taken. Raises UserError where there is none.
    """
    groups = values.float().reshape(values.shape[0], -1, 8)
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    found = torch.zeros_like(extreme)
    open_ = extreme[..., 0] != 0
    for top in range(63, 0, -1):
        if not open_.any():
            break
        part, biggest = groups[open_], extreme[open_]
        factor = (biggest / top).to(torch.float16).float()
        safe = torch.where(factor == 0, torch.ones_like(factor), factor)
        codes = (part / safe).round()
        fits = ((codes * factor == part) & (codes >= 0) & (codes <= 63)).all(-1)
        where = open_.nonzero()[fits]
        found[where[:, 0], where[:, 1]] = factor[fits]
        open_[where[:, 0], where[:, 1]] = False
    if open_.any():
        row, group = open_.nonzero()[0].tolist()
        raise UserError(
            f"scales {group * 8} to {group * 8 + 7} of row {row} are not 6-bit multiples of a float16 number"
        )
    codes = (groups / torch.where(found == 0, torch.ones_like(found), found)).round()
    return codes.reshape(values.shape).to(torch.uint8), found[..., 0].to(torch.float16)


def pack_q4_k(q: QTensor) -> np.ndarray:
    """codes uint4 [N, K], scales and offsets float32 [N, K/32] -> uint8 [N, K/256 * 144]. Raises UserError for scales
    that are not of two levels."""
    assert q.offset is not None
    sc, d = factors(q.scale)
    mn, dmin = factors(q.offset)
    n, blocks = d.shape
    s, m = (t.numpy().reshape(n, blocks, 8) for t in (sc, mn))
    six = np.concatenate(
        [
            s[..., :4] | (s[..., 4:] >> 4) << 6,
            m[..., :4] | (m[..., 4:] >> 4) << 6,
            (s[..., 4:] & 15) | (m[..., 4:] & 15) << 4,
        ],
        -1,
    )
    runs = q.codes.contiguous().numpy().reshape(n, blocks, 4, 2, 32)
    body = (runs[..., 0, :] | runs[..., 1, :] << 4).reshape(n, blocks, 128)
    halves = np.stack([d.numpy(), -dmin.numpy()], -1).view(np.uint8).reshape(n, blocks, 4)
    return np.concatenate([halves, six, body], -1).reshape(n, -1)


def unpack_q4_k(data: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse: codes uint8 [N, K], scales and offsets float32 [N, K/32]."""
    n = data.shape[0]
    b = np.ascontiguousarray(data).reshape(n, -1, 144)
    halves = np.ascontiguousarray(b[..., :4]).view(np.float16).astype(np.float32)
    low, mid, high = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    sc = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], -1)
    mn = np.concatenate([mid & 63, (high >> 4) | (mid >> 6) << 4], -1)
    runs = b[..., 16:].reshape(n, -1, 4, 1, 32)
    codes = np.concatenate([runs & 15, runs >> 4], -2)
    scale = torch.from_numpy((halves[..., :1] * sc).reshape(n, -1))
    offset = torch.from_numpy((-halves[..., 1:] * mn).reshape(n, -1))
    return torch.from_numpy(codes.reshape(n, -1).copy()), scale, offset
