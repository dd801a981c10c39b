"""ggml's K-quants: 256 weights a block, whose scales (and minima) are integer codes of a float16 number.

A value is (d * sc) * code, less (dmin * mn) where there are minima. All products of a float16 and an 8-bit code are
exact in float32, so that is how training and `Frozen` hold scales and offsets; here they are taken apart again,
exactly. Layouts: ggml-common.h, ggml-quants.c.
"""

import numpy as np
import torch
from torch import Tensor

from qat.affine import QTensor
from qat.errors import UserError
from qat.scheme import QuantSpec, check_block

# of scales and of minima: eight of each (Q4_K, Q5_K); of the sixteen scales of Q6_K
SUPER = QuantSpec(qtype="uint6", block=(1, 8), range="one_signed", scale="float16")
SUPER_SIGNED = QuantSpec(qtype="int8", block=(1, 16), range="signed_max", scale="float16")


def factors(values: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Products [N, B] (float32) -> (codes [N, B] of spec.qtype, float16 factors [N, B/block]), exactly.

    Of several factorisations the one with the largest codes is taken. Raises UserError where there is none.
    """
    low, high = spec.type.qmin, spec.type.qmax
    _, size = check_block((values.shape[0], values.shape[1]), spec.block)
    groups = values.float().reshape(values.shape[0], -1, size)
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    found = torch.zeros_like(extreme)
    open_ = extreme[..., 0] != 0
    for top in range(low, 0) if low else range(high, 0, -1):  # the code of the extreme, as ggml chooses its sign
        if not open_.any():
            break
        part, biggest = groups[open_], extreme[open_]
        factor = (biggest / top).to(torch.float16).float()
        safe = torch.where(factor == 0, torch.ones_like(factor), factor)
        codes = (part / safe).round()
        fits = ((codes * factor == part) & (codes >= low) & (codes <= high)).all(-1)
        where = open_.nonzero()[fits]
        found[where[:, 0], where[:, 1]] = factor[fits]
        open_[where[:, 0], where[:, 1]] = False
    if open_.any():
        row, group = open_.nonzero()[0].tolist()
        raise UserError(
            f"scales {group * size} to {group * size + size - 1} of row {row} are not {spec.type.bits}-bit multiples "
            "of a float16 number"
        )
    codes = (groups / torch.where(found == 0, torch.ones_like(found), found)).round()
    return codes.reshape(values.shape).to(spec.type.storage), found[..., 0].to(torch.float16)


def _six_bits(s: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Eight 6-bit scales and eight minima [N, B, 8] -> bytes [N, B, 12]."""
    return np.concatenate(
        [
            s[..., :4] | (s[..., 4:] >> 4) << 6,
            m[..., :4] | (m[..., 4:] >> 4) << 6,
            (s[..., 4:] & 15) | (m[..., 4:] & 15) << 4,
        ],
        -1,
    )


def _head(q: QTensor) -> list[np.ndarray]:
    """The first 16 bytes of Q4_K and Q5_K: f16 d, f16 dmin, 12 bytes of 6-bit scales and minima."""
    assert q.offset is not None
    sc, d = factors(q.scale, SUPER)
    mn, dmin = factors(q.offset, SUPER)
    n, blocks = d.shape
    halves = np.stack([d.numpy(), -dmin.numpy()], -1).view(np.uint8).reshape(n, blocks, 4)
    return [halves, _six_bits(*(t.numpy().reshape(n, blocks, 8) for t in (sc, mn)))]


def _from_head(b: np.ndarray) -> tuple[Tensor, Tensor]:
    """Blocks [N, B, bytes] -> scales and offsets float32 [N, 8 B]."""
    halves = np.ascontiguousarray(b[..., :4]).view(np.float16).astype(np.float32)
    low, mid, high = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    sc = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], -1)
    mn = np.concatenate([mid & 63, (high >> 4) | (mid >> 6) << 4], -1)
    scale, offset = halves[..., :1] * sc, -halves[..., 1:] * mn
    return torch.from_numpy(scale.reshape(len(b), -1)), torch.from_numpy(offset.reshape(len(b), -1))


def _pairs(q: QTensor) -> np.ndarray:
    """Codes [N, K] -> [N, B, 4, 2, 32]: runs of 64, whose halves share bytes."""
    return q.codes.contiguous().numpy().reshape(q.shape[0], -1, 4, 2, 32)


def pack_q4_k(q: QTensor) -> np.ndarray:
    """codes uint4 [N, K], scales and offsets float32 [N, K/32] -> uint8 [N, K/256 * 144]: the head, 128 bytes of
    nibbles. Raises UserError for scales that are not of two levels."""
    runs = _pairs(q)
    body = (runs[..., 0, :] | runs[..., 1, :] << 4).reshape(*runs.shape[:2], 128)
    return np.concatenate([*_head(q), body], -1).reshape(len(runs), -1)


def unpack_q4_k(data: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse: codes uint8 [N, K], scales and offsets float32 [N, K/32]."""
    b = np.ascontiguousarray(data).reshape(len(data), -1, 144)
    runs = b[..., 16:].reshape(*b.shape[:2], 4, 1, 32)
    codes = np.concatenate([runs & 15, runs >> 4], -2)
    return torch.from_numpy(codes.reshape(len(b), -1).copy()), *_from_head(b)


def pack_q5_k(q: QTensor) -> np.ndarray:
    """As Q4_K with codes uint5, 176 bytes: between head and nibbles 32 bytes of fifth bits (bit i of byte m: element
    m + 32 i). Raises UserError for scales that are not of two levels."""
    runs = _pairs(q)
    high = np.packbits((runs >> 4).reshape(*runs.shape[:2], 8, 32), axis=-2, bitorder="little")[..., 0, :]
    body = ((runs[..., 0, :] & 15) | runs[..., 1, :] << 4).reshape(*runs.shape[:2], 128)
    return np.concatenate([*_head(q), high, body], -1).reshape(len(runs), -1)


def unpack_q5_k(data: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse: codes uint8 [N, K], scales and offsets float32 [N, K/32]."""
    b = np.ascontiguousarray(data).reshape(len(data), -1, 176)
    high = np.unpackbits(b[..., None, 16:48], axis=-2, bitorder="little")
    runs = b[..., 48:].reshape(*b.shape[:2], 4, 1, 32)
    codes = np.concatenate([runs & 15, runs >> 4], -2).reshape(*b.shape[:2], 8, 32) | high << 4
    return torch.from_numpy(codes.reshape(len(b), -1).copy()), *_from_head(b)


def pack_q6_k(q: QTensor) -> np.ndarray:
    """codes int6 [N, K], scales float32 [N, K/16] -> uint8 [N, K/256 * 210]: 128 bytes of low nibbles of code + 32, 64
    of high pairs of bits, 16 int8 scales, f16 d. Raises UserError for scales that are not of two levels."""
    sc, d = factors(q.scale, SUPER_SIGNED)
    n, blocks = d.shape
    c = (q.codes.contiguous().numpy().view(np.uint8) + np.uint8(32)).reshape(n, blocks, 2, 4, 32)
    low = (c[..., :2, :] & 15) | (c[..., 2:, :] & 15) << 4
    pairs = c >> 4
    high = pairs[..., 0, :] | pairs[..., 1, :] << 2 | pairs[..., 2, :] << 4 | pairs[..., 3, :] << 6
    scales = sc.numpy().view(np.uint8).reshape(n, blocks, 16)
    half = d.numpy().view(np.uint8).reshape(n, blocks, 2)
    return np.concatenate([low.reshape(n, blocks, 128), high.reshape(n, blocks, 64), scales, half], -1).reshape(n, -1)


def unpack_q6_k(data: np.ndarray) -> tuple[Tensor, Tensor, None]:
    """The inverse: codes int8 [N, K], scales float32 [N, K/16]."""
    b = np.ascontiguousarray(data).reshape(len(data), -1, 210)
    low = b[..., :128].reshape(*b.shape[:2], 2, 2, 32)
    high = b[..., 128:192].reshape(*b.shape[:2], 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = (np.concatenate([low & 15, low >> 4], -2) | high << 4).astype(np.int8) - np.int8(32)
    d = np.ascontiguousarray(b[..., 208:]).view(np.float16).astype(np.float32)
    scale = d * b[..., 192:208].view(np.int8) + np.float32(0)  # no -0.0, which another factorisation would not give
    return torch.from_numpy(codes.reshape(len(b), -1)), torch.from_numpy(scale.reshape(len(b), -1)), None
