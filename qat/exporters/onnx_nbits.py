"""Block-quantized weights as ONNX Runtime keeps them (com.microsoft MatMulNBits and GatherBlockQuantized), both ways.

Codes are unsigned, packed along K from the low bits up: B is uint8 [N, K / bs, bs * bits / 8], scales are float32
[N, K / bs], zero points uint8 [N, ceil(K / bs * bits / 8)]. A signed code c is stored as c + 2**(bits - 1), which is
also the zero point then. An embedding table has the same bytes as B in another shape, so a tied head is stored once.
"""

import torch
from torch import Tensor

from qat.affine import QTensor
from qat.filed import words
from qat.packing import pack, unpack
from qat.scheme import QuantSpec, Scheme, check_block

BITS = (2, 4, 8)


def refuse_grid(spec: QuantSpec, shape: tuple[int, int]) -> str | None:
    """Why these operators cannot hold a weight (out, in) of this grid, and which one is near; None if they can."""
    bits = next((b for b in BITS if b >= spec.type.bits), 8)
    if spec.type.bits not in BITS:
        return f"MatMulNBits has codes of 2, 4 or 8 bits, not {spec.type.bits}; use {_sign(spec)}int{bits}"
    block = check_block(shape, spec.block)
    if block[0] != 1 or spec.block[1] < 16 or block[1] & (block[1] - 1):
        fits = [b for b in (256, 128, 64, 32, 16) if shape[1] % b == 0]
        near = min(fits, key=lambda b: abs(b - block[1]), default=None)
        remedy = "leave it in floating point with a rule" if near is None else f"use block (1, {near})"
        return f"MatMulNBits has one scale for 16, 32, 64, … weights of a row, not {spec.block}; {remedy}"
    if spec.offset not in (None, "zero_point"):
        return f"MatMulNBits has integer zero points, not floating offsets ({spec.label()}); use offset: zero_point"
    if not isinstance(spec.scale, str):
        return f"MatMulNBits has one level of scales ({spec.label()}); use scale: portable"
    return None


def _sign(spec: QuantSpec) -> str:
    return "u" if spec.type.qmin == 0 else ""


def level_4(block: int) -> QuantSpec:
    """What accuracy level 4 does to the input of MatMulNBits, for each row and block."""
    return QuantSpec(qtype="int8", block=(1, block), divide="reciprocal", scale="float32")


def refuse_input(scheme: Scheme) -> str | None:
    """Why MatMulNBits does not compute with this input grid, and which one fits; None if it does."""
    if scheme.input is None or scheme.weight is None:
        return None
    block = scheme.weight.block[1]
    want = level_4(block)
    if scheme.static or scheme.input != want:
        said = f"qtype: int8, block: [1, {block}], range: absmax, divide: reciprocal, scale: float32"
        return f"MatMulNBits rounds its input only by one formula (accuracy level 4), {{{said}}}; or leave it in float"
    if scheme.weight.type.bits == 2 and block not in (32, 64, 128):  # it computes in float there and does not say so
        return f"2-bit weights take rounded inputs in blocks of 32, 64 or 128 only, not {block}; use (1, 32)"
    return None


def encode(held: QTensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, scales, zero points) of a weight (N, K) on a grid that `refuse_grid` lets through."""
    spec, (rows, cols) = held.spec, (held.shape[0], held.shape[1])
    block = check_block((rows, cols), spec.block)[1]
    bits, shift = spec.type.bits, _shift(spec)
    if shift == -spec.type.qmin:
        data = _whole(words(held), cols, bits)
    else:
        data = _bytes(held.codes.contiguous().view(torch.uint8) + shift, bits)  # uint8 wraps, as it should
    zero = torch.zeros_like(held.scale, dtype=torch.int32) if held.offset is None else held.offset
    return data.reshape(rows, cols // block, -1), held.scale.float().contiguous(), _bytes(zero + shift, bits)


def decode(data: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    """The codes, float32 scales and zero points of what `encode` wrote, whatever shape it has by now.

    Raises ValueError if the sizes do not fit each other, or a symmetric grid has other zero points than its middle.
    """
    rows, blocks = scale.shape
    bits, shift = spec.type.bits, _shift(spec)
    codes = _codes(data.reshape(rows, -1), bits, data.numel() * 8 // bits // rows) - shift
    offset = None if zero is None else (_codes(zero.reshape(rows, -1), bits, blocks) - shift).to(torch.int32)
    if spec.offset is None:
        if offset is not None and offset.any():
            raise ValueError(f"a zero point differs from {shift}")
        offset = None
    elif offset is None:
        raise ValueError("the zero points are missing")
    return codes.to(spec.type.storage), scale, offset


def _shift(spec: QuantSpec) -> int:
    return 0 if spec.type.qmin == 0 else 2 ** (spec.type.bits - 1)


def _bytes(codes: Tensor, bits: int) -> Tensor:
    """(R, C) -> uint8 (R, ceil(C * bits / 8))."""
    return _whole(pack(codes.to(torch.uint8), bits), codes.shape[1], bits)


def _whole(packed: Tensor, cols: int, bits: int) -> Tensor:
    """The bytes of words that have codes in them."""
    return packed.view(torch.uint8)[:, : -(-cols * bits // 8)].contiguous()


def _codes(data: Tensor, bits: int, cols: int) -> Tensor:
    """The inverse of `_bytes`, int16."""
    padded = torch.nn.functional.pad(data, (0, -data.shape[1] % 4)).contiguous()
    return unpack(padded.view(torch.int32), bits, cols).to(torch.int16)
