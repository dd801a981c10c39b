"""Codes as frozen/ keeps them, packed, and the QTensor of such a file, which unpacks them when they are asked for."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat.affine import QTensor
from qat.packing import pack, unpack
from qat.scheme import QuantSpec

WIDTHS = (2, 4, 8)  # that are packed fast: int3 takes 4 bits, int5 and int6 take 8


def part(spec: QuantSpec) -> str:
    """How the file calls the codes of a weight: "words" where they are packed, "codes" where each takes a byte."""
    return "codes" if _width(spec) == 8 else "words"


def packed(q: QTensor) -> Tensor:
    """What the file has of codes (R, C): int32 words (R, ceil(C * width / 32)) of the codes less qmin, as packing.py
    has them. The codes themselves where a code takes a byte, or where one does not fit its width (of a damaged file,
    which must not look like another)."""
    if (held := _words(q)) is not None:
        return held
    bits, codes = _width(q.spec), q.codes
    if bits == 8 or codes.dtype != q.spec.type.storage:
        return codes
    low = q.spec.type.qmin
    ends = () if codes.is_meta or not codes.numel() else codes.aminmax()
    return codes if any(not low <= int(end) < low + 2**bits for end in ends) else pack(codes, bits, low)


def words(q: QTensor) -> Tensor:
    """int32 words (R, ceil(C * bits / 32)) of the codes (R, C) less qmin, packed as packing.py has it; a file's own
    where it has them."""
    held = _words(q)
    if held is not None and _width(q.spec) == q.spec.type.bits:
        return held
    return pack(q.codes, q.spec.type.bits, q.spec.type.qmin)


def _words(q: QTensor) -> Tensor | None:
    """Those that a file has of q."""
    held = q.__dict__.get("_codes")
    return held.words if isinstance(held, _Words) else None


def filed(stored: Tensor, scale: Tensor, offset: Tensor | None, spec: QuantSpec, shape: tuple[int, int]) -> QTensor:
    """The inverse of `packed`, for codes (R, C) of this shape; they are made each time that they are asked for."""
    if stored.dtype != torch.int32:
        return QTensor(stored, scale, offset, spec)
    return _Filed(_Words(stored, shape), scale, offset, spec)


def _width(spec: QuantSpec) -> int:
    return next(bits for bits in WIDTHS if bits >= spec.type.bits)


@dataclass(frozen=True)
class _Words:
    words: Tensor
    shape: tuple[int, int]

    def codes(self, spec: QuantSpec) -> Tensor:
        codes = unpack(self.words, _width(spec), self.shape[1]).view(spec.type.storage)
        return codes.add_(spec.type.qmin) if spec.type.qmin else codes  # int8 wraps, as it should


class _Filed(QTensor):
    """Its `codes` are of a file, until `dataclasses.replace` gives it others."""

    def __init__(self, codes: Tensor | _Words, scale: Tensor, offset: Tensor | None, spec: QuantSpec) -> None:
        held: dict[str, Any] = {"_codes": codes, "scale": scale, "offset": offset, "spec": spec}
        self.__dict__.update(held)

    @property
    def codes(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        held: Tensor | _Words = self.__dict__["_codes"]
        return held.codes(self.spec) if isinstance(held, _Words) else held

    @property
    def shape(self) -> torch.Size:
        held: Tensor | _Words = self.__dict__["_codes"]
        return torch.Size(held.shape)

    def blank(self) -> QTensor:
        codes = torch.empty(self.shape, dtype=self.spec.type.storage, device="meta")  # nothing is unpacked
        return QTensor(codes, self.scale, self.offset, self.spec)
