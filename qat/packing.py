"""Codes <-> bits: the dense little-endian packing that compressed-tensors, GPTQ, MLX and torch share. Lossless."""

import math

import torch
from torch import Tensor

_AS_WIDE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the number of bytes


def pack(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes (R, C), each below 2**bits, -> int32 words (R, ceil(C * bits / 32)).

    Element 0 takes the least significant bits; a code may straddle two words; the tail of the last word is zero.
    """
    rows, cols = codes.shape
    words = math.ceil(cols * bits / 32)
    if 8 % bits == 0:  # whole codes in a byte: one integer holds the codes of a byte, a byte each
        per = 8 // bits
        flat = _pad(codes.to(torch.uint8), words * 4 * per).reshape(-1).contiguous()
        if flat.storage_offset() % 8:  # a view of wider integers must begin at a whole one
            flat = flat.clone()
        c = flat.view(_AS_WIDE[per]).reshape(rows, words * 4)
        out = c if per == 1 else c >> (8 - bits)
        for i in range(2, per):
            out |= c >> (i * (8 - bits))
        out = out if per == 1 else (out | c).to(torch.uint8)  # the lowest byte; the others are left over
        return out.reshape(-1).view(torch.int32).reshape(rows, words)
    period = 32 // math.gcd(32, bits)  # codes after which the pattern of words repeats
    span = period * bits // 32
    groups = math.ceil(cols / period)
    c = _pad(codes.to(torch.int64), groups * period).reshape(rows, groups, period)
    out = torch.zeros(rows, groups, span, dtype=torch.int64, device=codes.device)
    for i in range(period):
        word, shift = divmod(i * bits, 32)
        out[..., word] |= c[..., i] << shift
        if shift + bits > 32:
            out[..., word + 1] |= c[..., i] >> (32 - shift)
    out &= 0xFFFFFFFF
    return out.reshape(rows, -1)[:, :words].to(torch.uint32).reshape(-1).view(torch.int32).reshape(rows, words)


def unpack(packed: Tensor, bits: int, cols: int) -> Tensor:
    """int32 words (R, W) -> unsigned codes (R, cols) uint8. Raises ValueError if the words are too few."""
    rows, words = packed.shape
    if words != math.ceil(cols * bits / 32):
        raise ValueError(f"{cols} codes of {bits} bits need {math.ceil(cols * bits / 32)} words a row, not {words}")
    if 8 % bits == 0:
        per = 8 // bits
        b = packed.reshape(-1).view(torch.uint8).reshape(rows, words * 4)
        out = torch.stack([(b >> (i * bits)) & (2**bits - 1) for i in range(per)], -1)
        return out.reshape(rows, -1)[:, :cols].contiguous()
    period = 32 // math.gcd(32, bits)
    span = period * bits // 32
    groups = math.ceil(cols / period)
    w = _pad(packed.reshape(-1).view(torch.uint32).reshape(rows, words).to(torch.int64), groups * span).reshape(
        rows, groups, span
    )
    out = torch.empty(rows, groups, period, dtype=torch.uint8, device=packed.device)
    for i in range(period):
        word, shift = divmod(i * bits, 32)
        code = w[..., word] >> shift
        if shift + bits > 32:
            code = code | (w[..., word + 1] << (32 - shift))
        out[..., i] = (code & (2**bits - 1)).to(torch.uint8)
    return out.reshape(rows, -1)[:, :cols].contiguous()


def _pad(x: Tensor, cols: int) -> Tensor:
    return x if cols == x.shape[1] else torch.nn.functional.pad(x, (0, cols - x.shape[1]))
