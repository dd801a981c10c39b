"""Codes <-> bits: the dense little-endian packing that compressed-tensors, GPTQ, MLX and torch share. Lossless."""

import math

import torch
from torch import Tensor

STRIP = 2**18  # packed bytes that are handled at a time
_AS_WIDE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the number of bytes


def pack(codes: Tensor, bits: int, low: int = 0) -> Tensor:
    """Codes (R, C), int8 or uint8, each from `low` to below low + 2**bits, -> int32 words (R, ceil(C * bits / 32)).

    Packed is the code less low. Element 0 takes the least significant bits; a code may straddle two words; the tail of
    the last word is zero.
    """
    rows, cols = codes.shape
    words = math.ceil(cols * bits / 32)
    if codes.is_meta:
        return codes.new_empty(rows, words, dtype=torch.int32)
    if 8 % bits == 0:
        whole = _pad(codes.contiguous(), words * 32 // bits, low)
        return _gather(whole.reshape(-1).view(torch.uint8), bits, low).view(torch.int32).reshape(rows, words)
    period = 32 // math.gcd(32, bits)  # codes after which the pattern of words repeats
    span = period * bits // 32
    groups = math.ceil(cols / period)
    c = _pad(codes.to(torch.int64) - low, groups * period).reshape(rows, groups, period)
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
        return _spread(packed.reshape(-1).view(torch.uint8), bits).reshape(rows, -1)[:, :cols].contiguous()
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


def _strips(size: int, device: torch.device) -> list[slice]:
    """Of a dimension, pieces that stay in a CPU's cache."""
    step = STRIP if device.type == "cpu" else max(1, size)
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


def _gather(codes: Tensor, bits: int, low: int) -> Tensor:
    """uint8 (N) codes, less `low` -> bytes (N * bits / 8) of whole codes, low bits first. One integer holds the codes
    of a byte, a byte each: every second moves down to its neighbour, then pairs do, into the lowest byte."""
    per = 8 // bits
    if per == 1 and not low:
        return codes if codes.storage_offset() % 4 == 0 else codes.clone()  # a view of words begins at a whole one
    out = torch.empty(len(codes) // per, dtype=torch.uint8, device=codes.device)
    strips = _strips(len(out), codes.device)
    apart = torch.empty(strips[0].stop * per if strips else 0, dtype=torch.uint8, device=codes.device)
    moved = torch.empty_like(apart.view(_AS_WIDE[per]))
    for at in strips:
        taken = codes[at.start * per : at.stop * per]
        x = torch.sub(taken, low % 256, out=apart[: len(taken)]).view(_AS_WIDE[per])  # uint8 wraps, as it should
        near = 1
        while near < per:
            x.bitwise_or_(torch.bitwise_right_shift(x, near * (8 - bits), out=moved[: len(x)]))
            near *= 2
        out[at] = x  # the lowest byte; the others are left over
    return out


def _spread(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `_gather` for low = 0. Each byte is widened to as many as it has codes, whose upper half moves up,
    then the upper halves of the halves."""
    per = 8 // bits
    out = torch.empty(packed.shape, dtype=_AS_WIDE[per], device=packed.device)
    strips = _strips(len(packed), packed.device)
    moved = torch.empty_like(out[strips[0]] if strips else out)
    for at in strips:
        x = out[at].copy_(packed[at])
        half = per // 2
        while half:
            upper = torch.bitwise_left_shift(x, half * (8 - bits), out=moved[: len(x)])
            x.bitwise_or_(upper).bitwise_and_(sum((2 ** (half * bits) - 1) << k for k in range(0, per * 8, half * 8)))
            half //= 2
    return out.view(torch.uint8)


def _pad(x: Tensor, cols: int, value: int = 0) -> Tensor:
    return x if cols == x.shape[1] else torch.nn.functional.pad(x, (0, cols - x.shape[1]), value=value)
